"""Labels that are vectors of numbers stay vectors in the snapshot, and are not mixed with classes."""

import json
import zipfile

import pytest
from click.testing import CliRunner
from tiny_runs import options, quiet

import finetune
from finetune.cli import cli
from finetune.errors import ConfigError
from finetune.options import TrainOptions
from finetune.train import prepare, run


@pytest.fixture
def with_vectors(images, tmp_path):
    """A copy of the images whose labels are a number and an angle."""
    path = tmp_path / "vectors.zip"
    with zipfile.ZipFile(images(16)) as archive, zipfile.ZipFile(path, "w") as copy:
        names = archive.namelist()
        for name in names:
            copy.writestr(name, archive.read(name))
        labels = [[name, [1, 30.5 * i]] for i, name in enumerate(names)]
        copy.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_label_vectors_are_stated_in_snapshot(images, with_vectors, tmp_path):
    asked = options(images, tmp_path, data=str(with_vectors), cond=True, kimg=0.004)
    snapshot = run(asked, console=quiet()).snapshot
    again = run(TrainOptions(resume=str(snapshot.parent), kimg=0.008), console=quiet()).snapshot
    exported = [tmp_path / "net.safetensors", tmp_path / "net.pth"]
    for path in exported:
        done = CliRunner().invoke(cli, ["convert", str(again), str(path)])
        assert done.exit_code == 0, done.output
    for path in (snapshot, again, *exported):
        said = CliRunner().invoke(cli, ["inspect", str(path)]).stdout
        assert "labels        vectors of 2 numbers\n" in said and "classes" not in said

    classes = options(images, tmp_path, resume=str(snapshot), data=str(images(16, 2)))
    with pytest.raises(ConfigError, match="labels are classes, those of the checkpoint vectors") as error:
        prepare(classes)
    assert "--classes fresh" in str(error.value)
    fresh = options(images, tmp_path, resume=str(snapshot), data=str(images(16, 2)), classes="fresh")
    assert prepare(fresh).image_set.label_kind == "classes"
    kept = options(images, tmp_path, resume=str(snapshot), data=str(with_vectors), classes="keep")
    assert "--classes keep has no effect: the checkpoint has as many classes." in prepare(kept).notes


def test_label_classes_are_stated_in_snapshot(images, tmp_path):
    asked = options(images, tmp_path, data=str(images(16, 2)), cond=True, kimg=0.004)
    snapshot = run(asked, console=quiet()).snapshot
    assert finetune.load(snapshot).label_kind == "classes"
