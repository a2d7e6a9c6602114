"""Every pair of formats: from one to the other, and all tensors are those of the source, bit for bit."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import finetune
from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.provenance import Provenance
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import ExportError
from finetune.export.formats import FORMATS
from finetune.models.stylegan2 import Generator

LOADABLE = ("stylegan-pkl", "safetensors", "rosinality-pt", "state-dict")
NAME = "stylegan2-32"  # the port has no labels, and needs the skip generator


def write(path, checkpoint, name: str) -> None:
    """As finetune.save, without the images that it compares."""
    importlib.import_module(FORMATS[name].module).write(path, checkpoint)


def same(first, second) -> None:
    assert first.missing == second.missing
    for name in ("G", "D", "G_ema"):
        if name not in first.missing:
            one, two = (getattr(side, name) for side in (first, second))
            assert tensors_of(one).keys() == tensors_of(two).keys()
            assert all(map(torch.equal, tensors_of(one).values(), tensors_of(two).values()))
            assert one.init_kwargs == two.init_kwargs


@pytest.fixture(scope="module")
def files(golden_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name in LOADABLE:
        write(folder / f"net{FORMATS[name].suffix}", golden_checkpoint(NAME), name)
    return folder


@pytest.fixture(scope="module")
def loaded(files):
    return {name: finetune.load(files / f"net{FORMATS[name].suffix}") for name in LOADABLE}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LOADABLE, LOADABLE)))
def test_round_trip_keeps_every_tensor(loaded, golden_checkpoint, tmp_path, first, second):
    source = loaded[first]
    path = tmp_path / f"again{FORMATS[second].suffix}"
    write(path, source, second)
    again = finetune.load(path)
    same(golden_checkpoint(NAME), again)
    assert again.provenance.parent["source"] == f"{NAME}.pkl"


@pytest.mark.parametrize("name", ["stylegan2-ada-32x16", "stylegan3-r-32"])
def test_round_trip_of_other_networks(golden_checkpoint, tmp_path, name):
    source = golden_checkpoint(name)
    write(tmp_path / "a.safetensors", source, "safetensors")
    write(tmp_path / "b.pth", finetune.load(tmp_path / "a.safetensors"), "state-dict")
    write(tmp_path / "c.pkl", finetune.load(tmp_path / "b.pth"), "stylegan-pkl")
    again = finetune.load(tmp_path / "c.pkl")
    assert all(map(torch.equal, tensors_of(source.G_ema).values(), tensors_of(again.G_ema).values()))
    with pytest.raises(ExportError, match="G_ema is not supported by the StyleGAN2 port"):
        finetune.save(source, tmp_path / "d.pt")


@pytest.mark.parametrize("name", ["stylegan-pkl", "safetensors", "state-dict"])
def test_round_trip_of_positional_arguments(tmp_path, name):
    G = Generator(16, 0, 16, 16, 3, channel_base=128, channel_max=8).eval().requires_grad_(False)
    path = tmp_path / f"net{FORMATS[name].suffix}"
    write(path, Checkpoint(G_ema=G, provenance=Provenance("finetune", "made here", "", 0)), name)
    again = finetune.load(path).G_ema
    assert (again.z_dim, again.img_resolution) == (16, 16)
    assert all(map(torch.equal, tensors_of(G).values(), tensors_of(again).values()))


def test_rosinality_keeps_two_means(files, tmp_path):
    """w_avg of G and of G_ema may differ, and the layout has one mean."""
    source = finetune.load(files / "net.pkl")
    source.G.mapping.w_avg.add_(1)
    write(tmp_path / "two.pt", source, "rosinality-pt")
    same(source, finetune.load(tmp_path / "two.pt"))


def test_rosinality_refuses_a_clamp_that_matters(files, tmp_path):
    """The port does not clamp: if that shows in an image, nothing is written."""
    source = finetune.load(files / "net.safetensors")
    source.G_ema.synthesis.b32.conv1.conv_clamp = 1e-3
    with pytest.raises(ExportError, match=r"image 0 of G_ema differs by .* \(tolerance 0.0001\)"):
        finetune.save(source, tmp_path / "clamped.pt")
    assert list(tmp_path.iterdir()) == []
