from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import GOLDEN_NETWORKS
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.errors import CheckpointError, CheckpointMismatch
from finetune.export.save import save

NAME = "stylegan2-64-cond"


@pytest.fixture(scope="module")
def exported(golden_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("safetensors") / "net.safetensors"
    save(golden_checkpoint(NAME), path)
    return path


def header_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def rewrite(path, target, change_tensors=None, change_header=None):
    """Copy a file with its tensors and header changed by the functions given."""
    tensors, header = safetensors.numpy.load_file(path), header_of(path)
    for function, value in ((change_tensors, tensors), (change_header, header)):
        if function is not None:
            function(value)
    safetensors.numpy.save_file(tensors, target, header)
    return target


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_safetensors_golden_numbers_survive(golden_checkpoint, golden_network, tmp_path, name):
    path = tmp_path / "net.safetensors"
    save(golden_checkpoint(name), path)
    again = finetune.load(path)
    _, golden = golden_network(name)
    z, c, real = (torch.from_numpy(golden[key]) for key in ("z", "c", "real"))
    assert again.missing == [] and again.family == golden_checkpoint(name).family
    assert_close(again.G_ema(z, c, noise_mode="const"), golden["img"], NETWORK_F32, "img")
    assert_close(again.D(real, c), golden["logits_real"], NETWORK_F32, "logits_real")
    for network in ("G", "D", "G_ema"):
        module = getattr(again, network)
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_safetensors_any_reader_opens_file(exported, golden_checkpoint):
    """Tensors under their dotted names, and a header that is strings and JSON."""
    checkpoint, header = golden_checkpoint(NAME), header_of(exported)
    tensors = safetensors.numpy.load_file(exported)
    np.testing.assert_array_equal(
        tensors["G_ema.synthesis.b4.const"], checkpoint.G_ema.synthesis.b4.const.numpy()
    )
    assert {name.split(".")[0] for name in tensors} == {"G", "D", "G_ema"}
    networks = json.loads(header["networks"])
    assert networks["G_ema"]["class"] == "Generator"
    assert networks["G_ema"]["init_kwargs"] == json.loads(json.dumps(checkpoint.G_ema.init_kwargs))
    assert header["family"] == "stylegan2"
    assert json.loads(header["finetune"])["source"]["sha256"] == checkpoint.provenance.sha256


def test_safetensors_provenance(exported, golden_checkpoint):
    provenance = finetune.load(exported).provenance
    assert provenance.generation == "finetune"
    assert provenance.parent == golden_checkpoint(NAME).provenance.to_dict()
    assert provenance.size == exported.stat().st_size


def test_safetensors_missing_and_a_stray_tensor(exported, tmp_path):
    def change(tensors):
        tensors["G.mapping.fc9.weight"] = tensors.pop("G.mapping.fc0.weight")

    path = rewrite(exported, tmp_path / "x.safetensors", change)
    with pytest.raises(CheckpointMismatch) as caught:
        finetune.load(path)
    assert any("mapping.fc0.weight" in line for line in caught.value.differences)
    assert any("mapping.fc9.weight" in line for line in caught.value.differences)


def test_safetensors_another_shape_and_dtype(exported, tmp_path):
    def change(tensors):
        tensors["D.b4.out.weight"] = tensors["D.b4.out.weight"][:, :-1].copy()
        tensors["D.b4.fc.bias"] = tensors["D.b4.fc.bias"].astype(np.int32)

    path = rewrite(exported, tmp_path / "x.safetensors", change)
    with pytest.raises(CheckpointMismatch) as caught:
        finetune.load(path)
    assert len(caught.value.differences) == 2


def test_safetensors_tensors_of_no_network(exported, tmp_path):
    path = rewrite(exported, tmp_path / "x.safetensors", lambda tensors: tensors.update(E=np.zeros(1)))
    with pytest.raises(CheckpointError, match=r"tensors of unknown networks \(E\)"):
        finetune.load(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_safetensors_numbers_that_numpy_does_not_know(exported, tmp_path, dtype):
    tensors = safetensors.torch.load_file(exported)
    tensors["D.b4.out.weight"] = tensors["D.b4.out.weight"].to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", header_of(exported))
    with pytest.raises(CheckpointError, match=r"D\.b4\.out\.weight has dtype (BF16|F8_E4M3), expected F32"):
        finetune.load(tmp_path / "x.safetensors")


def test_safetensors_content_decides_not_the_ending(exported, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(exported.read_bytes())
    assert finetune.load(path).missing == []


def test_safetensors_no_networks(tmp_path):
    header = {"format": "stylegan-finetune/1", "networks": "{}"}
    safetensors.numpy.save_file({}, tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match="none of G, D and G_ema"):
        finetune.load(tmp_path / "x.safetensors")


def change_arguments(**changes):
    def change(header):
        networks = json.loads(header["networks"])
        networks["G"]["init_kwargs"].update(changes)
        header["networks"] = json.dumps(networks)

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_arguments(img_resolution=1 << 40),
        change_arguments(w_dim="512"),
        change_arguments(channel_max=-1),
        lambda header: header.update(networks='{"G": 1, "D": 1, "G_ema": 1}'),
        lambda header: header.update(networks='{"G": '),
        lambda header: header.update(networks="[" * 100_000),
        lambda header: header.update(networks="{}"),
        lambda header: header.update(finetune="[1]"),
        lambda header: header.update(format="pt"),
    ],
)
def test_safetensors_hostile_headers(exported, tmp_path, change):
    path = rewrite(exported, tmp_path / "x.safetensors", change_header=change)
    with pytest.raises(CheckpointError):
        finetune.load(path)


def test_safetensors_no_such_file_and_no_such_format(exported, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        finetune.load(tmp_path / "absent.safetensors")
    for content, words in (
        (b"", "is empty"),
        (b"no tensors", "it is text: 'no tensors'"),
        (exported.read_bytes()[:-5], "damaged safetensors file"),
        (exported.read_bytes()[:100], "damaged safetensors file"),
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            finetune.load(tmp_path / "x.safetensors")
    header = rb'{"\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'.ljust(64)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"invalid offset for tensor `\?\[2J`"):
        finetune.load(tmp_path / "x.safetensors")


def test_safetensors_float16_is_reported_and_states_its_architecture(exported, tmp_path):
    def change(tensors):
        tensors["G.synthesis.b4.const"] = tensors["G.synthesis.b4.const"].astype(np.float16)

    path = rewrite(exported, tmp_path / "x.safetensors", change)
    assert finetune.load(path).notes == ("G: 1 tensors stored as float16 were widened to float32 (exact)",)
    with pytest.raises(CheckpointError, match="states how its networks are built"):
        finetune.load(path, architecture={"conv_clamp": 1})


def test_safetensors_of_others_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="format 'pt'"):
        finetune.load(tmp_path / "x.safetensors")
