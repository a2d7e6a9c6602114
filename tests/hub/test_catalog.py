"""The catalogue: every entry is as the schema has it, names are found and close ones suggested."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from finetune.errors import CheckpointError, ConfigError
from finetune.hub import catalog, identify
from finetune.hub.catalog import Entry
from finetune.hub.schema import problems_of, schema

jsonschema = pytest.importorskip("jsonschema")
FILE = Path(catalog.__file__).parents[2] / catalog.NAME
CONTENT = json.loads(FILE.read_text(encoding="utf-8"))


def test_every_entry_passes_the_schema():
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(CONTENT)
    assert problems_of(CONTENT) == []
    entries = catalog.read_catalogue(FILE)
    assert catalog.conflicts(entries.values()) == []
    assert sum(entry.kind == "checkpoint" for entry in entries.values()) == 176
    assert sum(entry.kind == "metric-network" for entry in entries.values()) == 11


def test_the_file_is_what_the_program_would_write():
    assert catalog.to_text(catalog.read_catalogue(FILE).values()) == FILE.read_text(encoding="utf-8")


def test_nothing_is_known_without_saying_from_where():
    for entry in catalog.read_catalogue(FILE).values():
        assert (entry.sha256 is None) == (entry.sha256_from is None), entry.id
        assert entry.sources, entry.id
        start = entry.published.get("trained", {}).get("start")
        assert start is None or start in catalog.catalogue(), entry.id


def changed(**changes):
    content = copy.deepcopy({**CONTENT, "checkpoints": CONTENT["checkpoints"][:1]})
    content["checkpoints"][0].update(changes)
    return content


WRONG = {
    'sha256 is "zz", which does not look like': changed(sha256="zz"),
    "size is 1.5, and must be integer or null": changed(size=1.5),
    "size is 0, and is at least 1": changed(size=0),
    "size is true, and must be": changed(size=True),
    'architecture is "stylegan4", and is one of "stylegan1"': changed(architecture="stylegan4"),
    "urls has 0 items, and needs 1": changed(urls=[]),
    r"urls\[0\] is \"ftp://a/b\"": changed(urls=["ftp://a/b"]),
    "licence lacks page": changed(licence={"name": "MIT"}),
    "licence.name has 301 letters, and may have 300": changed(licence={"name": "M" * 301, "page": None}),
    "colour has no meaning here": changed(colour="blue"),
    "published.trained.gamma is -1, and is at least 0": changed(published={"trained": {"gamma": -1}}),
    r"inferred\[0\] is \"all\", and is one of": changed(inferred=["all"]),
    "version is 2 and must be 1": {**CONTENT, "version": 2, "checkpoints": []},
    "it lacks checkpoints": {"version": 1},
    r"it is \[\], and must be object": [],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_catalogue_is_refused_with_the_entry_and_the_value(words, tmp_path):
    assert not jsonschema.Draft202012Validator(schema()).is_valid(WRONG[words])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(WRONG[words]))
    with pytest.raises(ConfigError, match=words) as caught:
        catalog.read_catalogue(path)
    assert str(path) in str(caught.value) and len(caught.value.problems) == 1


def test_names_that_clash_and_unsafe_addresses(tmp_path):
    one = Entry("a", ("https://a.org/a.pkl",), "stylegan2", aliases=("b",))
    two = Entry("B", ("http://a.org/a.pkl",), "stylegan2")
    problems = catalog.conflicts([one, two])
    assert "B is a name of a and of B" in problems[0] and "plain http" in problems[1]


def test_a_catalogue_of_ones_own(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    entries = [Entry("ours", ("https://a.org/a.pkl",), "stylegan2", sources=("us",))]
    path.write_text(catalog.to_text([entry.to_json() for entry in entries]))
    monkeypatch.setenv("FINETUNE_CATALOGUE", str(path))
    catalog.catalogue.cache_clear()
    try:
        assert catalog.find("ours") == entries[0] and catalog.find("ffhq256") is not None
        path.write_text("{")
        catalog.catalogue.cache_clear()
        with pytest.raises(ConfigError, match=r"mine\.json is not JSON"):
            catalog.catalogue()
    finally:
        monkeypatch.delenv("FINETUNE_CATALOGUE")
        catalog.catalogue.cache_clear()


@pytest.mark.parametrize(
    "name, found",
    [
        ("ffhq-256-stylegan2", "stylegan2-ffhq-256x256"),
        ("FFHQ256", "sg2ada-src-ffhq256"),
        ("stylegan3-r-ffhq-1024x1024.pkl", "stylegan3-r-ffhq-1024x1024"),
        ("stylegan2-ffhq-config-f", "tf-stylegan2-ffhq-config-f"),
        ("ffhq.pkl", None),  # of two entries
        ("ffhq", None),
    ],
)
def test_names(name, found):
    entry = catalog.find(name)
    assert (entry.id if entry else None) == found


@pytest.mark.parametrize(
    "name, close",
    [
        ("ffhq-256-stylgan2", "ffhq-256-stylegan2"),
        ("stylegan2-ffhq-256", "ffhq-256-stylegan2"),
        ("stylegan3-t-metface-1024x1024", "metfaces-1024-stylegan3-t"),
        ("ponies-512", "ponies"),
    ],
)
def test_close_names_are_suggested(name, close):
    with pytest.raises(CheckpointError, match=f"Did you mean {close}( or |\\?)"):
        catalog.get(name)


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(CheckpointError, match=r"(?s)xyzzy is no name.*list` shows") as caught:
        catalog.get("xyzzy")
    assert "Did you mean" not in str(caught.value)


def test_search_wants_every_word():
    found = {entry.id for entry in catalog.search(["FFHQ-U", "256px", "stylegan3"])}
    assert found == {"stylegan3-t-ffhqu-256x256", "stylegan3-r-ffhqu-256x256"}


def test_published_settings_as_recipes_take_them():
    known_by_name = identify.published(catalog.get("metfaces-1024-stylegan3-t"))
    assert known_by_name.trained == (6.6, 32)
    transfer = identify.published(catalog.get("ffhq-1024-stylegan3-t"))
    assert (transfer.trained, transfer.finetune) == ((32.8, 32), (6.6, 32))
    assert transfer.gamma("finetune", 16) == 13.2
    concluded = identify.published(catalog.get("ffhq-256-stylegan2"))
    assert "concluded" in concluded.name and (concluded.glr, concluded.dlr) == (0.0025, 0.0025)
    one_rate = identify.published(catalog.get("stylegan2-ffhq-config-f"))
    assert (one_rate.glr, one_rate.dlr, one_rate.target) == (0.002, 0.002, None)
    assert identify.published(catalog.get("lhq-1024")) is None
