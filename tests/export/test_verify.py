"""An export that does not read back as its source is refused, and never takes its name."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from finetune.errors import ExportError
from finetune.export import verify
from finetune.export.verify import FORMATS, export_checkpoint, verify_export

NAME = "stylegan2-64-cond"


def changed(checkpoint, name, change):
    """A checkpoint with one network changed by `change`."""
    network = copy.deepcopy(getattr(checkpoint, name))
    with torch.no_grad():
        change(network)
    return dataclasses.replace(checkpoint, **{name: network})


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, golden_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "net"
    calls = []
    result = export_checkpoint(
        path, golden_checkpoint(NAME), request.param, progress=lambda *numbers: calls.append(numbers)
    )
    return path, request.param, result, calls


def test_verify_result(exported, golden_checkpoint):
    path, file_format, result, calls = exported
    checkpoint = golden_checkpoint(NAME)
    assert result.networks == ("G", "D", "G_ema")
    names = [
        len({**dict(n.named_parameters()), **dict(n.named_buffers())}) for n in (checkpoint.G, checkpoint.D)
    ]
    assert result.num_tensors == 2 * names[0] + names[1]
    assert result.num_images == 16
    assert result.max_difference <= verify.IMAGE_TOLERANCE
    assert calls[-1] == (16, 16)
    assert verify_export(path, checkpoint, file_format) == result
    assert [other.name for other in path.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("name", ["G", "D", "G_ema"])
def test_verify_one_changed_weight_is_found(exported, golden_checkpoint, name):
    path, file_format, _, _ = exported

    def change(network):
        list(network.parameters())[-1].view(-1)[0] += 1e-6

    with pytest.raises(ExportError, match=rf"{name}\.[\w.]+ in the written file has other values"):
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
    with pytest.raises(ExportError, match="lacks"):
        verify_export(path, dataclasses.replace(golden_checkpoint(NAME), D=None), file_format)


def test_verify_file_that_cannot_be_read_is_found(exported, golden_checkpoint, tmp_path):
    path, file_format, _, _ = exported
    (tmp_path / "net").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cannot be read again"):
        verify_export(tmp_path / "net", golden_checkpoint(NAME), file_format)


@pytest.mark.parametrize("file_format", FORMATS)
def test_verify_failed_comparison_leaves_the_old_file(golden_checkpoint, tmp_path, monkeypatch, file_format):
    path = tmp_path / "net"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise ExportError("image 3 of G differs by 1 in the written file.")

    monkeypatch.setattr(verify, "verify_export", fail)
    with pytest.raises(ExportError, match="image 3"):
        export_checkpoint(path, golden_checkpoint(NAME), file_format)
    assert path.read_bytes() == b"old"
    assert [other.name for other in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("present", [("G_ema",), ("D",), ("G_ema", "D")])
def test_verify_partial_checkpoints(golden_checkpoint, tmp_path, file_format, present):
    checkpoint = golden_checkpoint(NAME)
    absent = {name: None for name in ("G", "D", "G_ema") if name not in present}
    partial = dataclasses.replace(checkpoint, **absent)
    result = export_checkpoint(tmp_path / "net", partial, file_format)
    assert set(result.networks) == set(present)
    assert result.num_images == (8 if "G_ema" in present else 0)


def test_verify_weights_that_are_not_numbers_are_still_compared(golden_checkpoint, tmp_path):
    """NaN in, NaN out: a broken network is exported as it is."""

    def change(network):
        network.synthesis.b64.torgb.bias.fill_(float("nan"))

    broken = changed(golden_checkpoint(NAME), "G_ema", change)
    partial = dataclasses.replace(broken, G=None, D=None)
    assert export_checkpoint(tmp_path / "net", partial, "stylegan-pkl").max_difference == 0


def test_verify_unknown_format(golden_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="'onnx' is not a format"):
        export_checkpoint(tmp_path / "net", golden_checkpoint(NAME), "onnx")
