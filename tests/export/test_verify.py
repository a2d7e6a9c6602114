"""An export that does not read back as its source is refused, and never takes its name."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import finetune
from finetune.errors import ConfigError, ExportError
from finetune.export import save as save_module
from finetune.export.formats import EQUAL, FORMATS, format_of
from finetune.export.save import save
from finetune.export.verify import verify_export

NAME = "stylegan2-64-cond"
PLAIN = ("stylegan-pkl", "safetensors")  # keep all networks; the others: test_round_trips.py, tests/foreign


def changed(checkpoint, name, change):
    """A checkpoint with one network changed by `change`."""
    network = copy.deepcopy(getattr(checkpoint, name))
    with torch.no_grad():
        change(network)
    return dataclasses.replace(checkpoint, **{name: network})


@pytest.fixture(scope="module", params=PLAIN)
def exported(request, golden_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "net"
    calls = []
    checkpoint = golden_checkpoint(NAME)
    result = save(checkpoint, path, request.param, progress=lambda *numbers: calls.append(numbers))
    return path, FORMATS[request.param], result, calls


def test_verify_result(exported, golden_checkpoint):
    path, file_format, result, calls = exported
    checkpoint = golden_checkpoint(NAME)
    assert result.networks == ("G", "D", "G_ema")
    names = [
        len({**dict(n.named_parameters()), **dict(n.named_buffers())}) for n in (checkpoint.G, checkpoint.D)
    ]
    assert result.num_tensors == 2 * names[0] + names[1]
    assert result.num_images == 16
    assert result.max_difference <= EQUAL
    assert calls[-1] == (16, 16)
    assert verify_export(path, checkpoint, file_format) == result
    assert [other.name for other in path.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("name", ["G", "D", "G_ema"])
def test_verify_one_changed_weight_is_found(exported, golden_checkpoint, name):
    path, file_format, _, _ = exported

    def change(network):
        list(network.parameters())[-1].view(-1)[0] += 1e-6

    with pytest.raises(ExportError, match=rf"{name}\.[\w.]+: differs in the written file"):
        verify_export(path, changed(golden_checkpoint(NAME), name, change), file_format)


def test_verify_other_images_from_equal_weights_are_found(exported, golden_checkpoint):
    path, file_format, _, _ = exported

    def change(network):
        network.synthesis.b32.conv1.act_gain *= 1.01

    with pytest.raises(ExportError, match=r"image 0 of G_ema differs by"):
        verify_export(path, changed(golden_checkpoint(NAME), "G_ema", change), file_format)


def test_verify_other_scores_from_equal_weights_are_found(exported, golden_checkpoint):
    path, file_format, _, _ = exported

    def change(network):
        network.b4.conv.act_gain *= 1.01

    with pytest.raises(ExportError, match=r"the score of image 0 by D differs by"):
        verify_export(path, changed(golden_checkpoint(NAME), "D", change), file_format)


def test_verify_missing_network_is_found(exported, golden_checkpoint):
    path, file_format, _, _ = exported
    with pytest.raises(ExportError, match="has the networks"):
        verify_export(path, dataclasses.replace(golden_checkpoint(NAME), D=None), file_format)


def test_verify_file_that_cannot_be_read_is_found(exported, golden_checkpoint, tmp_path):
    path, file_format, _, _ = exported
    (tmp_path / "net").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cannot be opened"):
        verify_export(tmp_path / "net", golden_checkpoint(NAME), file_format)


@pytest.mark.parametrize("file_format", PLAIN)
def test_verify_failed_comparison_leaves_the_old_file(golden_checkpoint, tmp_path, monkeypatch, file_format):
    path = tmp_path / "net"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise ExportError("image 3 of G differs by 1 in the written file.")

    monkeypatch.setattr(save_module, "verify_export", fail)
    with pytest.raises(ExportError, match="image 3"):
        save(golden_checkpoint(NAME), path, file_format)
    assert path.read_bytes() == b"old"
    assert [other.name for other in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("file_format", PLAIN)
@pytest.mark.parametrize("present", [("G_ema",), ("D",), ("G_ema", "D")])
def test_verify_partial_checkpoints(golden_checkpoint, tmp_path, file_format, present):
    checkpoint = golden_checkpoint(NAME)
    absent = {name: None for name in ("G", "D", "G_ema") if name not in present}
    partial = dataclasses.replace(checkpoint, **absent)
    result = save(partial, tmp_path / "net", file_format)
    assert set(result.networks) == set(present)
    assert result.num_images == (8 if "G_ema" in present else 0)


def test_verify_weights_that_are_not_numbers_are_still_compared(golden_checkpoint, tmp_path):
    """NaN in, NaN out: a broken network is exported as it is."""

    def change(network):
        network.synthesis.b64.torgb.bias.fill_(float("nan"))

    broken = changed(golden_checkpoint(NAME), "G_ema", change)
    partial = dataclasses.replace(broken, G=None, D=None)
    assert save(partial, tmp_path / "net", "stylegan-pkl").max_difference == 0


def test_verify_unknown_format(golden_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="format 'jpeg' is unknown"):
        save(golden_checkpoint(NAME), tmp_path / "net", "jpeg")


def test_save_which_writes_one_network(golden_checkpoint, tmp_path):
    result = save(golden_checkpoint("stylegan2-32"), tmp_path / "net.pkl", which="D")
    again = finetune.load(tmp_path / "net.pkl")
    assert result.networks == ("D",) and again.missing == ["G", "G_ema"] and again.augment_pipe is None
    with pytest.raises(ConfigError, match=r"net.pkl has no G_ema. It has D"):
        save(again, tmp_path / "other.pkl", which="G_ema")
    with pytest.raises(ConfigError, match="which 'E' is unknown"):
        save(again, tmp_path / "other.pkl", which="E")


def test_save_half_measures_its_difference(golden_checkpoint, tmp_path):
    checkpoint = golden_checkpoint("stylegan2-32")
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save(checkpoint, whole)
    result = save(checkpoint, half, half=True)
    assert 0 < result.max_difference < 0.1
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    G, rounded = checkpoint.G_ema, finetune.load(half).G_ema
    assert torch.equal(rounded.mapping.fc0.weight, G.mapping.fc0.weight.half().float())
    assert torch.equal(rounded.mapping.w_avg, G.mapping.w_avg)
    with pytest.raises(ConfigError, match="Use one of safetensors, rosinality-pt, state-dict, or omit half"):
        save(checkpoint, tmp_path / "half.pkl", half=True)


def test_save_half_refuses_weights_beyond_float16(golden_checkpoint, tmp_path):
    def change(network):
        network.mapping.fc0.weight[0, 0] = 1e5

    with pytest.raises(ExportError, match=r"G_ema\.mapping\.fc0\.weight has values above 65504"):
        save(changed(golden_checkpoint(NAME), "G_ema", change), tmp_path / "a.safetensors", half=True)
    assert list(tmp_path.iterdir()) == []


def test_format_is_that_of_the_ending(tmp_path):
    assert format_of("a.PKL").name == "stylegan-pkl"
    assert format_of("a", "safetensors").name == "safetensors"
    with pytest.raises(ConfigError, match=r"unknown suffix '.jpg'. Use one of .pkl"):
        format_of("a.jpg")
    with pytest.raises(ConfigError, match=r"Use one of \.pkl [^;]*state-dict\)\.$"):
        format_of("a.jpg", option=None)
    with pytest.raises(ConfigError, match=r"Use format stylegan-pkl, or a name that ends in .safetensors"):
        format_of("a.pkl", "safetensors")
