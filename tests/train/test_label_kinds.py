"""Snapshots state the kind of labels and the names of classes; images with others are refused."""

import dataclasses
import json
import zipfile

import pytest
from click.testing import CliRunner
from tiny_runs import options, quiet
from tolerances import SAME_F32, assert_close

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


@pytest.fixture(scope="module")
def in_folders(images, tmp_path_factory):
    """Call with names of classes to get a data set that has a folder of images for each."""

    def make(*names):
        path = tmp_path_factory.mktemp("set") / "photos.zip"
        with zipfile.ZipFile(images(16)) as archive, zipfile.ZipFile(path, "w") as copy:
            for number, name in enumerate(archive.namelist()):
                copy.writestr(f"{names[number % len(names)]}/{name}", archive.read(name))
        return str(path)

    return make


@pytest.fixture(scope="module")
def of_three(images, in_folders, tmp_path_factory):
    """A snapshot whose classes are boots, hats and scarves."""
    data = in_folders("hats", "boots", "scarves")
    folder = tmp_path_factory.mktemp("three")
    return run(options(images, folder, data=data, labels="folders", kimg=0.004), console=quiet()).snapshot


def test_class_names_are_stated_in_snapshot(of_three, tmp_path):
    again = run(TrainOptions(resume=str(of_three.parent), kimg=0.008), console=quiet()).snapshot
    exported = [tmp_path / "net.safetensors", tmp_path / "net.pth", tmp_path / "net.pkl"]
    for path in exported:
        finetune.save(finetune.load(of_three), path)
    for path in (of_three, again, *exported):
        assert finetune.load(path).class_names == ("boots", "hats", "scarves")
    said = CliRunner().invoke(cli, ["inspect", str(exported[0])]).stdout
    assert "classes       3: boots, hats, scarves\n" in said


@pytest.mark.parametrize(
    "names, differences",
    [
        (
            ("dresses", "hats", "scarves"),
            "class 0 is 'dresses', in the checkpoint 'boots'.",
        ),
        (  # a subset
            ("hats", "scarves"),
            "class 0 is 'hats', in the checkpoint 'boots'; class 1 is 'scarves', in the checkpoint 'hats'.",
        ),
    ],
)
def test_class_names_that_differ_are_refused(of_three, in_folders, names, differences, tmp_path):
    data = in_folders(*names)
    runs = tmp_path / "runs"
    asked = ["--resume", of_three, "--data", data, "--labels", "folders", "--outdir", runs, "--device", "cpu"]
    asked += ["--sd-weight", 0, "--metrics", "none", "--kimg", 0.004]
    done = CliRunner().invoke(cli, ["train", *map(str, asked)])
    assert done.exit_code == 2 and not runs.exists()
    assert f"{data}: {differences}\n" in done.output and "--classes keep" in done.output
    asked = [data, "--network", of_three, "--labels", "folders"]
    done = CliRunner().invoke(cli, ["dataset", "check", *map(str, asked)])
    assert done.exit_code == 2 and f"{data}: {differences}\n" in done.stderr and not done.stdout


def test_evaluate_states_class_names_that_differ(of_three, in_folders):
    def said(*names):
        asked = ["--data", in_folders(*names), "--labels", "folders", "--metrics", "random-fid", "--num", 8]
        done = CliRunner().invoke(cli, ["evaluate", "--network", str(of_three), *map(str, asked)])
        assert done.exit_code == 0
        return done.stderr

    note = "class 2 is 'shoes', in the checkpoint 'scarves'. Classes are compared by number."
    assert note in said("boots", "hats", "shoes")
    assert "in the checkpoint" not in said("boots", "hats", "scarves")


def test_class_names_in_another_order_are_refused(of_three, images, tmp_path):
    asked = options(images, tmp_path, resume=str(of_three), data=_numbered(images, tmp_path, "hats", "boots"))
    asked = dataclasses.replace(asked, cond=True)
    with pytest.raises(ConfigError, match="class 0 is 'hats', in the checkpoint 'boots'; class 1 is 'boots'"):
        prepare(asked)
    moved = prepare(dataclasses.replace(asked, classes="keep"))
    assert "G, classes 3 → 2: changed mapping.embed: 2 of 3 classes kept" in moved.notes
    old, new = (G.mapping.embed for G in (finetune.load(of_three).G, moved.state.G))
    assert_close(new.weight * new.weight_gain, (old.weight * old.weight_gain)[:, [1, 0]], SAME_F32)


def test_class_names_equal_or_unknown_are_accepted(of_three, in_folders, images, tmp_path):
    asked = options(images, tmp_path, resume=str(of_three), labels="folders")
    for names in [("boots", "hats", "scarves"), ("boots", "hats")]:  # the others have their numbers
        assert prepare(dataclasses.replace(asked, data=in_folders(*names))).image_set.class_names == names
    kept = dataclasses.replace(asked, data=in_folders("boots", "hats", "scarves"), classes="keep")
    assert "--classes keep has no effect: the checkpoint has as many classes." in prepare(kept).notes
    fresh = dataclasses.replace(asked, data=in_folders("a", "b", "c"), classes="fresh")
    assert "G, fresh classes: initialized at random: mapping.embed" in prepare(fresh).notes
    numbers = dataclasses.replace(asked, data=str(images(16, 3)), labels=None)
    assert prepare(numbers).image_set.class_names == ()
    unnamed = tmp_path / "unnamed.pkl"
    finetune.save(dataclasses.replace(finetune.load(of_three), training_set_kwargs={}), unnamed)
    other = dataclasses.replace(asked, resume=str(unnamed), data=in_folders("a", "b", "c"))
    assert prepare(other).image_set.class_names == ("a", "b", "c")


def _numbered(images, tmp_path, *names):
    """Return a zip whose dataset.json has numbers for classes and, in that order, their names."""
    path = tmp_path / "numbered.zip"
    with zipfile.ZipFile(images(16, len(names))) as archive, zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            if name != "dataset.json":
                copy.writestr(name, archive.read(name))
        stated = {**json.loads(archive.read("dataset.json")), "classes": names}
        copy.writestr("dataset.json", json.dumps(stated))
    return str(path)
