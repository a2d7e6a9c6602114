"""Files of torch.save: the layouts that open, with golden numbers, and those that are refused."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import CheckpointError, CheckpointMismatch, PickleRefused
from finetune.models import stylegan3

LEGACY = {"_use_new_zipfile_serialization": False}
KINDS = pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])


def saved(value, path, options=None):
    with warnings.catch_warnings():  # torch cannot find the source of classes of this file
        warnings.simplefilter("ignore")
        torch.save(value, path, **(options or {}))
    return path


@pytest.fixture(scope="module")
def port(golden_dir):
    """The golden tensors of the StyleGAN2 port, as torch reads them, and its numbers."""
    content = torch.load(golden_dir / "rosinality-32.pt", weights_only=True)
    with np.load(golden_dir / "rosinality-32.npz") as arrays:
        return content, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@KINDS
def test_rosinality_golden_images(port, tmp_path, options):
    content, golden = port
    checkpoint = finetune.load(saved(content, tmp_path / "net.pt", options))
    G, c = checkpoint.G_ema, torch.zeros([3, 0])
    assert checkpoint.missing == ["G", "D"] and checkpoint.provenance.generation == "rosinality"
    ws = G.mapping(golden["z"], c)
    assert_close(ws[:, 0], golden["w"], NETWORK_F32, "w")
    assert_close(G(golden["z"], c, noise_mode="const"), golden["img"], NETWORK_F32, "img")
    truncated = G(golden["z"], c, noise_mode="const", truncation_psi=0.7)
    assert_close(truncated, golden["img_trunc07"], NETWORK_F32, "img_trunc07")
    assert_close(G(golden["z"], c, noise_mode="none"), golden["img_nonoise"], NETWORK_F32, "img_nonoise")
    ws[:, 4:] = G.mapping(golden["z2"], c)[:, 4:]
    assert_close(G.synthesis(ws, noise_mode="const"), golden["img_mix4"], NETWORK_F32, "img_mix4")


def test_rosinality_training_file_with_namespace(port, golden_dir):
    checkpoint = finetune.load(golden_dir / "rosinality-32-train.pt")
    assert checkpoint.missing == []
    assert_close(checkpoint.D(port[1]["img"], torch.zeros([3, 0])), port[1]["logits"], NETWORK_F32, "logits")
    notes = "\n".join(checkpoint.notes)
    assert "entry `args` ignored: foreign class argparse.Namespace" in notes
    assert "G_ema: no mean w in the file; estimated from 10,000 z" in notes
    G = checkpoint.G_ema
    z = torch.randn([2000, G.z_dim], generator=torch.Generator().manual_seed(1))
    w = G.mapping(z, torch.zeros([2000, 0]))[:, 0]
    assert (w.mean(dim=0) - G.mapping.w_avg).abs().max() < 5 * w.std(dim=0).max() / 2000**0.5


def wrapped(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


def test_rosinality_saved_under_ddp(port, golden_dir, tmp_path):
    content = torch.load(golden_dir / "rosinality-32-train.pt", weights_only=False)
    networks = {name: wrapped(content[name]) for name in ("g", "d", "g_ema")}
    whole = finetune.load(golden_dir / "rosinality-32-train.pt")
    checkpoint = finetune.load(saved(networks, tmp_path / "net.pt"))
    assert checkpoint.missing == [] and checkpoint.provenance.generation == "rosinality"
    for name in ("G", "D", "G_ema"):
        ours, theirs = (tensors_of(getattr(each, name)) for each in (checkpoint, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_state_dict_saved_under_ddp(golden_dir, tmp_path):
    G = finetune.load(golden_dir / "stylegan2-32.pkl").G_ema
    again = finetune.load(saved(wrapped(G.state_dict()), tmp_path / "net.pt")).G_ema
    assert all(torch.equal(tensor, tensors_of(again)[key]) for key, tensor in tensors_of(G).items())


def test_state_dict_with_some_names_wrapped_is_refused(port, tmp_path):
    state = wrapped(port[0]["g_ema"])
    state["input.input"] = state.pop("module.input.input")
    with pytest.raises(CheckpointError, match="state dict of an unknown network"):
        finetune.load(saved({"g_ema": state}, tmp_path / "net.pt"))


def test_rosinality_other_tensors_are_listed(port, tmp_path):
    state = dict(port[0]["g_ema"])
    state["extra"] = torch.zeros(1)
    state["convs.0.conv.weight"] = state["convs.0.conv.weight"][0]
    del state["noises.noise_2"]
    with pytest.raises(CheckpointMismatch) as caught:
        finetune.load(saved({"g_ema": state}, tmp_path / "net.pt"))
    listed = "\n".join(caught.value.differences)
    assert "extra [1] is in the file" in listed and "b8.conv1.noise_const [8, 8] is not in" in listed


@pytest.mark.parametrize("name", ["stylegan2-32-orig", "stylegan2-64-cond", "stylegan3-r-32"])
def test_state_dict_architecture_follows_from_shapes(golden_dir, tmp_path, name):
    source = finetune.load(golden_dir / f"{name}.pkl")
    content = {key: tensors_of(getattr(source, key)) for key in ("G_ema", "D")}
    again = finetune.load(saved(content, tmp_path / "net.pt"))
    G, c = source.G_ema, torch.zeros([2, source.G_ema.c_dim])
    assert again.missing == ["G"] and again.family == source.family
    assert "assumed conv_clamp=256" in again.notes[0]
    z = torch.randn([2, G.z_dim])
    img = G(z, c, noise_mode="const", truncation_psi=0.5)
    assert torch.equal(again.G_ema(z, c, noise_mode="const", truncation_psi=0.5), img)
    assert torch.equal(again.D(img, c), source.D(img, c))


@KINDS
def test_state_dict_of_one_network(golden_dir, tmp_path, options):
    source = finetune.load(golden_dir / "stylegan2-ada-32.pkl")
    for name in ("G_ema", "D"):
        again = finetune.load(saved(getattr(source, name).state_dict(), tmp_path / "net.pt", options))
        assert torch.equal(next(getattr(again, name).parameters()), next(getattr(source, name).parameters()))


def test_state_dict_without_published_bands_needs_them(tmp_path):
    G = stylegan3.Generator(
        8, 0, 8, 16, 3, channel_base=128, channel_max=8, num_layers=4, num_critical=1, first_cutoff=1.5
    )
    path = saved(G.state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="StyleGAN3 generator whose layers are not those") as caught:
        finetune.load(path)
    assert "first_cutoff" in caught.value.hint and "--arch" in caught.value.hint
    again = finetune.load(path, architecture={"num_critical": 1, "first_cutoff": 1.5, "channel_base": 128})
    z = torch.randn([2, 8])
    G.eval().requires_grad_(False)  # with gradients, other kernels are used
    assert torch.equal(again.G_ema(z, torch.zeros([2, 0])), G(z, torch.zeros([2, 0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["stylegan2-ada-32", "stylegan3-t-32", "stylegan3-r-32"])
def test_state_dict_of_another_precision(name, dtype, golden_dir, tmp_path):
    source = finetune.load(golden_dir / f"{name}.pkl")
    rounded = {
        key: {path: tensor.to(dtype) for path, tensor in getattr(source, key).state_dict().items()}
        for key in ("G_ema", "D")
    }
    again = finetune.load(saved(rounded, tmp_path / "net.pt"))
    for key, tensors in rounded.items():
        assert all(torch.equal(v, tensors[k].float()) for k, v in getattr(again, key).state_dict().items())
    assert again.G_ema.init_kwargs.get("resample_filter", [1, 3, 3, 1]) == [1, 3, 3, 1]
    assert again.D.init_kwargs["block_kwargs"]["resample_filter"] == [1, 3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rosinality_of_another_precision(port, dtype, golden_dir, tmp_path):
    content = {key: value.to(dtype) for key, value in port[0]["g_ema"].items()}
    mean = port[0]["latent_avg"].to(dtype)
    again = finetune.load(saved({"g_ema": content, "latent_avg": mean}, tmp_path / "net.pt"))
    wanted = finetune.load(golden_dir / "rosinality-32.pt").G_ema.state_dict()
    for key, tensor in again.G_ema.state_dict().items():
        assert torch.equal(tensor, wanted[key].to(dtype).float()), key


NAN = torch.full([4, 4], torch.nan)
FILTERS = [torch.ones(4, 3), torch.eye(4), torch.zeros(4, 4), NAN, torch.ones(1, 4, 4)]


@pytest.mark.parametrize("taps", FILTERS, ids=["wide", "not separable", "zero", "nan", "3 axes"])
def test_state_dict_with_another_filter_is_refused(taps, golden_dir, tmp_path):
    tensors = finetune.load(golden_dir / "stylegan2-ada-32.pkl").G_ema.state_dict()
    tensors["synthesis.b4.resample_filter"] = taps
    with pytest.raises(CheckpointError, match=r"synthesis\.b4\.resample_filter is no separable filter"):
        finetune.load(saved(tensors, tmp_path / "net.pt"))


def test_state_dict_architecture_that_cannot_be_given(golden_dir, tmp_path):
    pickle = golden_dir / "stylegan2-ada-32.pkl"
    with pytest.raises(CheckpointError, match=r"ada-32\.pkl: the file states how its networks are built"):
        finetune.load(pickle, architecture={"conv_clamp": 1})
    path = saved(finetune.load(pickle).G_ema.state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="architecture color: unknown"):
        finetune.load(path, architecture={"color": 1})
    with pytest.raises(PickleRefused, match="conv_clamp is 'x'"):
        finetune.load(path, architecture={"conv_clamp": "x"})
    assert finetune.load(path, architecture={"conv_clamp": 8}).G_ema.init_kwargs["conv_clamp"] == 8


def test_state_dict_of_another_network(tmp_path):
    path = saved({"layer.weight": torch.zeros(2)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"net\.pt: G_ema is a state dict of an unknown network"):
        finetune.load(path)


class Node(torch.nn.Module):
    """A module of a class that is unknown to the reader."""


def as_modules(state: dict[str, torch.Tensor]) -> Node:
    root = Node()
    for key, tensor in state.items():
        module, *path = [root], *key.split(".")
        *path, name = path
        for part in path:
            if part not in module[0]._modules:
                module[0].add_module(part, Node())
            module = [module[0]._modules[part]]
        module[0].register_parameter(name, torch.nn.Parameter(tensor))
    return root


@KINDS
def test_whole_modules(port, golden_dir, tmp_path, options):
    source = finetune.load(golden_dir / "stylegan2-ada-32.pkl").G_ema
    again = finetune.load(saved({"G_ema": source}, tmp_path / "ours.pt", options))
    assert all(map(torch.equal, source.parameters(), again.G_ema.parameters()))
    again = finetune.load(saved(as_modules(port[0]["g_ema"]), tmp_path / "theirs.pt", options))
    assert torch.equal(again.G_ema.synthesis.b4.const, port[0]["g_ema"]["input.input"][0])


UNUSED = [torch.complex64, torch.complex128, torch.uint16, torch.uint64, torch.float8_e4m3fn]


@pytest.mark.parametrize("options", [{}, LEGACY, None], ids=["zip", "legacy", "pickle"])
def test_training_file_with_other_keys_and_types(port, tmp_path, options):
    """Entries that no network needs: states of optimizers by address, and tensors that no network has."""
    tensors = [torch.zeros(3, dtype=dtype) for dtype in UNUSED]
    optimizer = {"state": {139876543210000: {"step": 1.0}}, "by value": {0.5: 1}}
    content = {
        "g_ema": port[0]["g_ema"],
        "g_optim": optimizer,
        "other": [*tensors, torch.nn.Parameter(tensors[0])],
    }
    path = tmp_path / "net.pt"
    if options is None:
        path.write_bytes(pickle.dumps(content))
    else:
        saved(content, path, options)
    checkpoint = finetune.load(path)
    assert torch.equal(checkpoint.G_ema.synthesis.b4.const, port[0]["g_ema"]["input.input"][0])
    notes = "\n".join(checkpoint.notes)
    assert (
        "entry `other` ignored: foreign class torch." in notes and "unknown entries ignored: g_optim" in notes
    )


@KINDS
@pytest.mark.parametrize("dtype", UNUSED[1:3])
def test_networks_of_other_types_are_refused_alone(port, tmp_path, dtype, options):
    content = {"g": {"x": torch.zeros(2, dtype=dtype)}, "g_ema": port[0]["g_ema"]}
    checkpoint = finetune.load(saved(content, tmp_path / "net.pt", options))
    assert checkpoint.missing == ["G", "D"] and checkpoint.foreign["G"].startswith("torch.")


# Refusals.


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@KINDS
@pytest.mark.parametrize("place", ["alone", "beside weights"])
def test_os_system_in_torch_save(tmp_path, options, place):
    marker = tmp_path / "executed"
    content = Runs(marker) if place == "alone" else {"g_ema": {"a": torch.zeros(1)}, "args": Runs(marker)}
    with pytest.raises(PickleRefused, match="nothing was executed") as refusal:
        finetune.load(saved(content, tmp_path / "net.pt", options))
    assert refusal.value.blocked == f"{os.system.__module__}.system"
    assert not marker.exists()


def members_of(value) -> dict[str, bytes]:
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members with the same name
        for name, raw in members.items():
            archive.writestr(name.removesuffix("#"), raw)
    return stream.getvalue()


def changed(name: str, raw: bytes | None) -> bytes:
    """A file of one tensor of four elements with another member `name`, or without it."""
    members = members_of({"G_ema": {"x": torch.zeros(4)}})
    folder = next(iter(members)).partition("/")[0]
    members[f"{folder}/{name}"] = raw
    return zipped({key: value for key, value in members.items() if value is not None})


def with_id(key: bytes) -> bytes:
    """A pickle of one persistent id."""
    return b"\x80\x02" + key + b"Q."


def named(key: str) -> bytes:
    return zipped(members_of({"G_ema": {key: torch.zeros(1)}}))


ZIPS = {
    "compressed": (zipped(members_of(torch.zeros(4)), zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "bomb": (zipped({"a/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "missing storage": (changed("data/0", None), "tensor storage '0' is not in the file"),
    "short storage": (changed("data/0", bytes(8)), "of 4 elements has 8 bytes"),
    "long storage": (changed("data/0", bytes(1 << 12)), "of 4 elements has 4,096 bytes"),
    "other byte order": (changed("byteorder", b"big"), "not little-endian"),
    "two of one name": (zipped({"a/data.pkl": b"N.", "a/data.pkl#": b"N."}), "with the same name"),
    "more pickle": (changed("data.pkl", b"\x80\x02N.N."), "bytes after the end"),
    "persistent id, text": (changed("data.pkl", with_id(b"U\x02os")), "SHORT_BINSTRING"),
    "persistent id, name": (changed("data.pkl", with_id(b"X\x02\0\0\0os")), "storage of unknown kind"),
    "persistent id, class": (
        changed("data.pkl", with_id(b"(X\x07\0\0\0storagecos\nsystem\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04t")),
        r"os\.system",
    ),
    "persistent id, other storage": (
        changed("data.pkl", with_id(b"(X\x07\0\0\0storagecx\ny\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04t")),
        "storage of unknown kind",
    ),
    "name with control characters": (named("\x1b[2J"), "an invalid tensor name"),
    "name of a million dots": (named("." * 1_000_000), "an invalid tensor name"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zip_archives(tmp_path, name):
    data, words = ZIPS[name]
    path = tmp_path / "net.pt"
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(PickleRefused, match=words) as refusal:
        finetune.load(path)
    assert time.monotonic() - started < 5 and "\x1b" not in str(refusal.value)


def _as_false(match: re.Match) -> bytes:
    return match[1] + b"\x89"


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda data: data[:-1], "may be cut off"),
        (lambda data: data + b"x", "bytes after the last tensor storage"),
        (lambda data: data[:-24] + (1 << 50).to_bytes(8, "little") + data[-16:], "may be cut off"),
        (lambda data: data[:-24] + bytes(8), "of 4 elements has 0 bytes"),
        (lambda data: data.replace(b"FloatStorage", b"OtherStorage"), "storage of unknown kind"),
        (lambda data: re.sub(rb"(?s)(little_endian..)\x88", _as_false, data), "not little-endian"),
    ],
)
def test_hostile_legacy_files(tmp_path, cut, words):
    stream = io.BytesIO()
    torch.save({"G_ema": {"x": torch.zeros(4)}}, stream, **LEGACY)
    (tmp_path / "net.pt").write_bytes(cut(stream.getvalue()))
    with pytest.raises(PickleRefused, match=words):
        finetune.load(tmp_path / "net.pt")


def test_network_that_is_a_harmless_object_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(changed("data.pkl", b"\x80\x02}X\x05\0\0\0G_emacdatetime\ndate\n)Rs."))
    with pytest.raises(PickleRefused, match=r"G_ema in .* needs datetime\.date"):
        finetune.load(path)


def test_whole_modules_that_share_tables_end_at_a_bound(tmp_path):
    """A module that contains itself, and tables shared by all modules, end at a bound."""
    root = Node()
    root.__dict__["_modules"] = {f"m{i}": root for i in range(100)}
    with pytest.raises((PickleRefused, CheckpointError)):
        finetune.load(saved(root, tmp_path / "net.pt"))


@KINDS
def test_damaged_files_load_or_are_refused(port, tmp_path, options):
    stream = io.BytesIO()
    torch.save(port[0], stream, **options)
    data, rng = stream.getvalue(), random.Random(0)
    places = [i for i in range(len(data)) if i < 12_000 or i > len(data) - 12_000]
    for _ in range(8):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
        (tmp_path / "net.pt").write_bytes(damaged)
        try:
            finetune.load(tmp_path / "net.pt")
        except CheckpointError:
            pass


@pytest.mark.parametrize("D", [{}, {"features.0.weight": torch.zeros(3)}], ids=["empty", "foreign"])
def test_state_dict_with_another_discriminator(port, tmp_path, D):
    content = {name: port[0][name] for name in ("g_ema", "latent_avg")}
    checkpoint = finetune.load(saved({**content, "d": D}, tmp_path / "net.pt"))
    assert checkpoint.missing == ["G", "D"] and checkpoint.G_ema is not None
    note = "D: not opened, a state dict of an unknown network (features.0.weight"
    assert sum(line.startswith(note) for line in checkpoint.notes) == len(D)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"x": torch.zeros(2)}, "epoch": 3}, "a dict of state_dict, epoch"),
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({}, "a dict of no entries"),
    ],
)
def test_file_without_networks_names_next_step(content, found, tmp_path):
    with pytest.raises(PickleRefused, match=f"holds none of G, D and G_ema, but {found}") as caught:
        finetune.load(saved(content, tmp_path / "net.pt"))
    assert "torch.save({'G_ema': state_dict}, file)" in caught.value.hint
