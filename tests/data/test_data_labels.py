"""`dataset.json`: what is accepted, and that everything wrong is told at once."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch

from finetune.data import ImageSet, scan
from finetune.data.labels import read_labels
from finetune.data.sources import open_source
from finetune.errors import DataError

NAMES = ["a/0.png", "a/1.png", "b/2.png"]


@pytest.fixture
def labeled(write_set, encode, noise):
    """Call with the content of dataset.json to get a set of three images."""

    def write(content, name: str = "set"):
        files = {image: encode(noise(4, 4, 3)) for image in NAMES}
        return write_set({**files, "dataset.json": content} if content is not None else files, name)

    return write


def read(path, num_classes=None):
    source = open_source(path)
    return read_labels(source, source.names, num_classes)


def pairs(*values):
    return {"labels": [list(pair) for pair in zip(NAMES, values)]}


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_labels_classes_become_one_hot(labeled, name):
    labels, problems = read(labeled(pairs(2, 0, 2), name))
    assert problems == [] and labels.num_classes == 3
    assert np.array_equal([labels.one_hot(i) for i in range(3)], [[0, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert labels.one_hot(0).dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ((1, 0, 2), "classes"),
        ((1.0, 0.0, 2.0), "classes"),
        (([0, 1], [1, 0], [0.0, 1.0]), "classes"),
        (([0, 1], [1, 1], [0, 1]), "vectors"),
        (([0, 1], [0.5, 0.5], [0, 1]), "vectors"),
        (([0, 1], [2, -1], [0, 1]), "vectors"),
    ],
)
def test_labels_kind(labeled, labels, kind):
    assert read(labeled(pairs(*labels)))[0].kind == kind


def test_labels_class_names(labeled, monkeypatch):
    accented = unicodedata.normalize("NFD", "étoile")
    named = [(pairs(0, 1, 0), ["étoile", "zèbre"]), (pairs(0, 2, 0), ["a", accented, "b"])]
    for number, (content, names) in enumerate(named):
        labels, _ = read(labeled({**content, "classes": [*names, "not used"]}, f"named{number}"), 4)
        assert labels.class_names == tuple(unicodedata.normalize("NFC", name) for name in names)
    wrong = [None, {"a": 0, "b": 1}, ["a", 1], ["a"], ["a", "a"], ["étoile", accented]]
    for number, names in enumerate(wrong):
        labels, _ = read(labeled({**pairs(0, 1, 0), "classes": names}, f"unnamed{number}"))
        assert labels.class_names == (), names
    source = open_source(labeled(None))
    assert read_labels(source, source.names[:1], 4, "folders")[0].class_names == ("a", "b")
    monkeypatch.setattr("finetune.data.labels.MAX_CLASS_NAMES", 1)
    assert read_labels(source, source.names, None, "folders")[0].class_names == ()


def test_labels_vectors_are_kept(labeled):
    labels, problems = read(labeled(pairs([0.5, -1], [1, 2], [0, 1e-3])))
    assert problems == [] and labels.num_classes == 2
    assert np.array_equal(labels.one_hot(2), np.float32([0, 1e-3]))


def test_labels_num_classes_from_network(labeled):
    path = labeled(pairs(0, 1, 1))
    labels, _ = read(path, num_classes=5)
    assert labels.one_hot(1).tolist() == [0, 1, 0, 0, 0]
    _, problems = read(path, num_classes=1)
    assert [(p.name, p.detail) for p in problems] == [
        (name, "class 1, but the classes are 0 to 0") for name in NAMES[1:]
    ]
    _, problems = read(labeled(pairs([1, 2], [1, 2], [1, 2]), "other"), num_classes=3)
    assert [p.detail for p in problems] == ["a vector of 2 numbers instead of 3"] * 3


@pytest.mark.parametrize(
    "values, details",
    [
        ((0, -1, 1.5), {1: "-1 is negative", 2: "1.5 is not a whole number"}),
        ((True, None, "3"), {0: "true is not a whole number", 1: "null is", 2: '"3" is not a whole number'}),
        ((0, 1, 10**9), {2: "class 1000000000"}),
        (([1, 2], [1], 3), {1: "a vector of 1 numbers instead of 2", 2: "3 is no vector"}),
        (([1.0], [float("nan")], [1e39]), {1: "NaN in its vector", 2: "1e+39 in its vector"}),
        (
            ([10**400], ["x"], [False]),
            {0: "000… in its vector", 1: '"x" in its vector', 2: "false in its vector"},
        ),
    ],
)
def test_labels_every_wrong_label_is_listed(labeled, values, details):
    labels, problems = read(labeled(pairs(*values)))
    assert labels is None and [p.name for p in problems] == [NAMES[i] for i in details]
    for problem, detail in zip(problems, details.values()):
        assert detail in problem.detail


def test_labels_missing_and_unreadable_listed_together(labeled):
    path = labeled({"labels": [["a/0.png", 0], ["elsewhere.png", 7]]})
    (path / "b/2.png").write_bytes(b"")
    found = scan(path, use_labels=True)
    with pytest.raises(DataError) as caught:
        found.raise_for_problems()
    text = str(caught.value)
    assert "2 of 3 images" in text and "cannot be read: 1" in text and "has no usable label: 2" in text
    assert "a/1.png: not in dataset.json" in text and "b/2.png: is empty" in text and "a/0.png" not in text
    with pytest.raises(DataError, match=r"b/2\.png: not in dataset\.json"):
        ImageSet(path, resolution=4, channels=3, use_labels=True)


def test_labels_none_suggested_only_for_unconditional_network(labeled):
    path = labeled(None)
    with pytest.raises(DataError, match="or train without labels"):
        scan(path, use_labels=True)
    with pytest.raises(DataError, match="the network has 5 classes, so every image needs one") as caught:
        scan(path, use_labels=True, num_classes=5)
    assert "without labels" not in str(caught.value)


@pytest.mark.parametrize(
    "content, word",
    [
        (None, "dataset.json is missing"),
        ({"labels": None}, "no labels"),
        ({}, "no labels"),
        ([], "no labels"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ({"labels": {"a/0.png": 1}}, "must be a list, not dict"),
        ({"labels": [["a/0.png"]]}, "entry 0 of labels"),
        ({"labels": [["a/0.png", 1], [7, 1]]}, "entry 1 of labels"),
        ({"labels": [["a/0.png", 1], ["a\\0.png", 2]]}, "two labels, 1 and 2"),
    ],
)
def test_labels_unusable_files(labeled, content, word):
    path = labeled(content)
    with pytest.raises(DataError, match=word):
        read(path)
    # A set used without labels does not care.
    assert ImageSet(path, resolution=4, channels=3).num_classes == 0


def test_labels_names_with_backslashes_match(labeled):
    labels, _ = read(labeled({"labels": [[name.replace("/", "\\"), i] for i, name in enumerate(NAMES)]}))
    assert labels.values.tolist() == [0, 1, 2]


def test_labels_of_image_set(labeled):
    path = labeled(pairs(2, 0, 2))
    images = ImageSet(path, resolution=4, channels=3, use_labels=True, num_classes=4, mirror=True)
    assert images.num_classes == 4
    assert [images[i][1].argmax() for i in range(6)] == [2, 0, 2, 2, 0, 2]
    drawn = images.random_labels(300, torch.Generator().manual_seed(0))
    assert drawn.shape == (300, 4) and drawn.dtype == torch.float32
    share = drawn.mean(0)
    assert share[1] == share[3] == 0 and 0.25 < share[0] < 0.42 and share.sum() == 1
    assert torch.equal(drawn, images.random_labels(300, torch.Generator().manual_seed(0)))
    assert images.random_labels(0).shape == (0, 4)


def test_labels_absent_have_length_0(labeled):
    images = ImageSet(labeled(None), resolution=4, channels=3)
    assert images.num_classes == 0 and images[0][1].shape == (0,) and images[0][1].dtype == np.float32
    assert images.random_labels(5).shape == (5, 0)


def test_scan_counts_classes(labeled):
    found = scan(labeled(pairs(2, 0, 2)), use_labels=True)
    found.raise_for_problems()
    assert found.num_classes == 3 and found.class_counts == [1, 0, 2]
    assert found.notes[-1:] == ["1 of 3 classes have no image: 1."]
