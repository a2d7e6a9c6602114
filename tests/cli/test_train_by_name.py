"""`finetune train --resume NAME -n` for checkpoints of different kinds, from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile

import pytest
from click.testing import CliRunner
from fake_catalog import served
from PIL import Image

from finetune.cli import cli
from finetune.hub import catalog, identify

# Name to type -> the golden file that is served in the place of the real one.
KINDS = {
    "ffhq-1024-stylegan3-t": "stylegan3-t-32",
    "ffhqu-256-stylegan3-r": "stylegan3-r-32",
    "ffhq-256-stylegan2": "stylegan2-32",
    "celebahq256": "stylegan2-ada-32",  # a short name; settings are published for fine-tuning it
    "stylegan2-ffhq-config-f": "stylegan2-tf-32",
    "tf-stylegan2-ffhq-config-e-Gorig-Dorig": "stylegan2-32-orig",
    "cifar10-32-stylegan2": "stylegan2-64-cond",
    "wikiart-c-1024": "stylegan2-64-cond",  # nothing published
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of 32 px and as many of 64 px, with labels of as many classes as golden files have."""
    folder = tmp_path_factory.mktemp("data")
    for size, classes in ((32, 10), (64, 5)):
        labels = []
        with zipfile.ZipFile(folder / f"{size}.zip", "w") as archive:
            for i in range(12):
                with archive.open(f"{i}.png", "w") as stream:
                    Image.new("RGB", (size, size), (30 * i, 0, 0)).save(stream, "PNG")
                labels.append([f"{i}.png", i % classes])
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return folder


def train(network, images, *arguments, offline=False, dry_run=True):
    size = 64 if KINDS.get(network, "").endswith("64-cond") else 32
    options = ["train", "--resume", network, "--data", images / f"{size}.zip", "--sd-backbone", "l2"]
    if offline:
        options = ["--offline", *options]
    options += ["--device", "cpu", *arguments, *(["--dry-run"] if dry_run else [])]
    return CliRunner().invoke(cli, [str(word) for word in options])


def fetch(network):
    result = CliRunner().invoke(cli, ["checkpoints", "fetch", network])
    assert result.exit_code == 0, result.output


@pytest.fixture
def server(request, tmp_path, monkeypatch, golden_dir):
    """Serves a golden file under the name, and with the published settings, of a public checkpoint."""
    monkeypatch.setenv("COLUMNS", "200")
    name = getattr(request, "param", "ffhq-256-stylegan2")
    entry = catalog.get(name)
    content = (golden_dir / f"{KINDS[name]}.pkl").read_bytes()
    with served(tmp_path, {entry.id: content}, monkeypatch) as running:
        stated = {field: getattr(entry, field) for field in ("aliases", "licence", "published", "inferred")}
        digest = hashlib.sha256(content).hexdigest()
        running.state(entry.id, **stated, size=len(content), sha256=digest, sha256_from="this test")
        yield running


def table(output):
    """Option -> (value, why) of the table that a run begins with."""
    lines = re.finditer(r"^\W*--([\w-]+) +(\S+) +(\S.*?)\W*$", output, re.MULTILINE)
    return {line[1]: (line[2], line[3]) for line in lines}


@pytest.mark.parametrize(
    "server, name", [(name, name) for name in KINDS], indirect=["server"], ids=list(KINDS)
)
def test_train_recipe_of_public_checkpoint(server, name, images):
    entry = catalog.get(name)
    fetch(name)
    published = identify.published(entry)
    for recipe, which in (("few-shot", "finetune"), ("improve", "trained")):
        result = train(name, images, "--recipe", recipe, offline=True)
        assert result.exit_code == 0 and "Fetching" not in result.output, result.output
        rows = table(result.stdout)
        assert {"gamma", "glr", "dlr", "batch", "ema-kimg", "freezed", "sd-weight", "aug"} <= rows.keys()
        value, why = rows["gamma"]
        gamma = published and published.gamma(which, int(rows["batch"][0]))
        if gamma is None:
            assert "published settings" not in why
        else:
            assert float(value) == gamma and f"published settings of {entry.id}" in why
        for option in ("glr", "dlr"):
            rate = published and getattr(published, option)
            value, why = rows[option]
            assert float(value) == rate if rate else "published settings" not in why
    assert len(server.requests) == 1
    assert table(train(name, images, "--gamma", "3.5").stdout)["gamma"][0] == "3.5"


def test_train_catalog_url_is_its_entry(server, images):
    entry = catalog.get("ffhq-256-stylegan2")
    fetch(entry.urls[0])
    result = train(entry.urls[0], images)
    assert result.exit_code == 0, result.output
    assert f"published settings of {entry.id}" in result.stdout


def test_train_suggests_close_names(server, images):
    result = train("ffhq-256-stylgan2", images)
    assert result.exit_code == 2 and server.requests == []
    assert "Did you mean ffhq-256-stylegan2" in result.stderr and "Traceback" not in result.output


def test_train_offline_sends_no_request(server, images):
    result = train("ffhq-256-stylegan2", images, offline=True, dry_run=False)
    assert result.exit_code == 2 and server.requests == []
    assert "is not on this machine" in result.stderr and "add-file" in result.stderr
