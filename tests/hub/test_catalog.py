"""The catalog: every entry matches the schema, names are found and similar ones suggested."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

from finetune.errors import CheckpointError, ConfigError
from finetune.hub import catalog, identify
from finetune.hub.catalog import Entry

jsonschema = pytest.importorskip("jsonschema")
FILE = Path(catalog.__file__).parents[2] / catalog.NAME
CONTENT = json.loads(FILE.read_text(encoding="utf-8"))
SCHEMA = json.loads(Path(catalog.__file__).with_name("checkpoints.schema.json").read_text(encoding="utf-8"))


def test_catalog_matches_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(CONTENT)
    assert catalog.problems_of(CONTENT) == []
    entries = catalog.read_catalog(FILE)
    assert catalog.conflicts(entries.values()) == []
    assert sum(entry.kind == "checkpoint" for entry in entries.values()) == 176
    assert sum(entry.kind == "metric-network" for entry in entries.values()) == 11


def test_catalog_file_is_normalized():
    assert catalog.to_text(catalog.read_catalog(FILE).values()) == FILE.read_text(encoding="utf-8")


def test_catalog_states_sources():
    for entry in catalog.read_catalog(FILE).values():
        assert (entry.sha256 is None) == (entry.sha256_from is None), entry.id
        assert entry.sources, entry.id
        start = entry.published.get("trained", {}).get("start")
        assert start is None or start in catalog.entries(), entry.id


def changed(**changes):
    content = copy.deepcopy({**CONTENT, "checkpoints": CONTENT["checkpoints"][:1]})
    content["checkpoints"][0].update(changes)
    return content


WRONG = {
    'sha256 is "zz" and must be 64 hexadecimal digits in lower case, or null': changed(sha256="zz"),
    "size is 1.5 and must be a whole number of at least 1, or null": changed(size=1.5),
    "size is 0 and must be": changed(size=0),
    "size is true and must be": changed(size=True),
    'architecture is "stylegan4" and must be one of stylegan1, ': changed(architecture="stylegan4"),
    r"urls is \[\] and must be a list of at least one item": changed(urls=[]),
    r"urls is \[\"ftp://a/b\"\] and must be": changed(urls=["ftp://a/b"]),
    "licence.page is missing": changed(licence={"name": "MIT"}),
    "licence.name is .*M… and must be a string of at most 300": changed(
        licence={"name": "M" * 301, "page": None}
    ),
    "color is not a field of the catalog": changed(color="blue"),
    "published.trained.gamma is -1 and must be a number of at least 0": changed(
        published={"trained": {"gamma": -1}}
    ),
    r"inferred is \[\"all\"\] and must be": changed(inferred=["all"]),
    "version is 2 and must be 1": {**CONTENT, "version": 2, "checkpoints": []},
    "checkpoints is missing": {"version": 1},
    r"it is \[\] and must be an object": [],
}


@pytest.mark.parametrize("words", WRONG)
def test_read_catalog_refuses_with_entry_and_value(words, tmp_path):
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(WRONG[words])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(WRONG[words]))
    with pytest.raises(ConfigError, match=words) as caught:
        catalog.read_catalog(path)
    assert str(path) in str(caught.value) and len(caught.value.problems) == 1


VALUES = [
    *(None, True, False, 0, 1, -1, 0.5, 2.0, "", "x", " x", "x y", "x" * 101, "x" * 301, "x" * 501, "a" * 64),
    *("https://a/b", "http://a/b", "ada", "checkpoint", "safetensors", "stylegan2"),
    *([], ["x"], ["urls"], ["https://a/b"], [""], [1], {}, {"x": 1}, {"name": "M", "page": None}),
    *({"name": "M", "page": "https://a/b", "remark": "r"}, {"trained": {}}, {"trained": {"gamma": 1}}),
]


def places(entry):
    """Every object of an entry that has fields, with the names of these."""
    yield entry, [*SCHEMA["$defs"]["checkpoint"]["properties"], "other"]
    yield entry["licence"], ["name", "page", "remark", "other"]
    yield entry["published"], ["trained", "finetune", "one_gpu", "other"]
    yield entry["published"]["trained"], [*SCHEMA["$defs"]["settings"]["properties"], "other"]


def test_problems_of_agrees_with_schema():
    """On every field with every kind of value, and without the field."""
    whole = changed(licence={"name": "M", "page": None}, published={"trained": {"gamma": 1}})
    entry = whole["checkpoints"][0]
    validator = jsonschema.Draft202012Validator(SCHEMA)
    outcomes = []
    for target, names in places(entry):
        for name in names:
            before = dict(target)
            for value in [*VALUES, "missing"]:
                target[name] = value
                if value == "missing":
                    del target[name]
                outcomes.append(validator.is_valid(whole))
                assert (catalog.problems_of(whole) == []) == outcomes[-1], (name, value)
            target.clear()
            target.update(before)
    assert 100 < sum(outcomes) < len(outcomes) - 500


def test_conflicts_of_names_and_urls(tmp_path):
    one = Entry("a", ("https://a.org/a.pkl",), "stylegan2", aliases=("b",))
    two = Entry("B", ("http://a.org/a.pkl",), "stylegan2")
    problems = catalog.conflicts([one, two])
    assert "B is a name of a and of B" in problems[0] and "plain http" in problems[1]


def test_entries_include_those_of_a_custom_catalog(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    entries = [
        Entry("ours", ("https://a.org/a.pkl",), "stylegan2", sources=("us",), aliases=("ffhq256",)),
        Entry("stylegan3-r-ffhq-1024x1024", ("https://a.org/b.pkl",), "stylegan2", sources=("us",)),
    ]
    path.write_text(catalog.to_text(entries))
    monkeypatch.setenv("FINETUNE_CATALOG", str(path))
    catalog.entries.cache_clear()
    try:
        assert catalog.find("ours") == entries[0] and catalog.find("ffhq-256-stylegan2") is not None
        for entry in entries:  # names of the shipped catalog too
            assert all(catalog.find(name) == entry for name in (entry.id, *entry.aliases))
        path.write_text("{")
        catalog.entries.cache_clear()
        with pytest.raises(ConfigError, match=r"mine\.json: the catalog is not JSON"):
            catalog.entries()
    finally:
        monkeypatch.delenv("FINETUNE_CATALOG")
        catalog.entries.cache_clear()


def test_shipped_catalog_is_found_where_pip_puts_it(tmp_path, monkeypatch):
    assert catalog.shipped_catalog() == FILE
    package = tmp_path / "lib" / "finetune" / "hub" / "catalog.py"
    monkeypatch.setattr(catalog, "__file__", str(package))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "lib")])
    with pytest.raises(ConfigError, match=r"checkpoints\.json, the catalog .* is missing.*\nInstall"):
        catalog.shipped_catalog()
    info = tmp_path / "lib" / "stylegan_finetune-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: stylegan-finetune\nVersion: 1.0\n")
    (info / "RECORD").write_text(
        "finetune/__init__.py,,\n../user/share/stylegan-finetune/checkpoints.json,,\n"
    )
    by_record = tmp_path / "user" / "share" / "stylegan-finetune" / "checkpoints.json"
    by_target = tmp_path / "lib" / "share" / "stylegan-finetune" / "checkpoints.json"
    for path in (by_record, by_target):
        path.parent.mkdir(parents=True)
        path.touch()
        assert catalog.shipped_catalog().resolve() == path.resolve()


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
def test_find_by_name(name, found):
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
def test_get_suggests_similar_names(name, close):
    with pytest.raises(CheckpointError, match=f"Did you mean {close}( or |\\?)"):
        catalog.get(name)


def test_get_without_similar_name():
    with pytest.raises(CheckpointError, match=r"(?s)xyzzy is not in the catalog.*list` shows") as caught:
        catalog.get("xyzzy")
    assert "Did you mean" not in str(caught.value)


def test_search_requires_every_word():
    found = {entry.id for entry in catalog.search(["FFHQ-U", "256px", "stylegan3"])}
    assert found == {"stylegan3-t-ffhqu-256x256", "stylegan3-r-ffhqu-256x256"}


def test_search_finds_singular():
    assert catalog.search(["cats"]) == catalog.search(["cat"]) != []


def test_published_settings_of_entries():
    known_by_name = identify.published(catalog.get("metfaces-1024-stylegan3-t"))
    assert known_by_name.trained == (6.6, 32)
    transfer = identify.published(catalog.get("ffhq-1024-stylegan3-t"))
    assert (transfer.trained, transfer.finetune) == ((32.8, 32), (6.6, 32))
    assert transfer.gamma("finetune", 16) == 13.2
    inferred = identify.published(catalog.get("ffhq-256-stylegan2"))
    assert "inferred" in inferred.name and (inferred.glr, inferred.dlr) == (0.0025, 0.0025)
    one_rate = identify.published(catalog.get("stylegan2-ffhq-config-f"))
    assert (one_rate.glr, one_rate.dlr, one_rate.target) == (0.002, 0.002, None)
    assert identify.published(catalog.get("lhq-1024")) is None
