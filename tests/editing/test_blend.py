from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from click.testing import CliRunner

import finetune
from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.provenance import MAX_BLENDS, Provenance
from finetune.checkpoint.rebuild import tensors_of
from finetune.cli import cli
from finetune.editing.blend import blend, relation, weight_distance
from finetune.errors import ConfigError
from finetune.export.save import save
from finetune.models.stylegan2 import Generator


@pytest.fixture(scope="module", params=["stylegan2-32", "stylegan3-t-32"])
def A(request, golden_dir):  # noqa: N802
    return finetune.load(golden_dir / f"{request.param}.pkl")


@pytest.fixture(scope="module")
def small():
    """A checkpoint that is quick to write."""
    G = Generator(
        z_dim=8, c_dim=0, w_dim=8, img_resolution=16, img_channels=3, channel_base=128, channel_max=8
    )
    origin = Provenance("finetune", "a.pkl", "a" * 64, 1, licence="MIT")
    return Checkpoint(G_ema=G.eval().requires_grad_(False), provenance=origin)


def descendant(A, seed=1, amount=0.1):
    """A checkpoint whose weights are those of A and some noise, and whose file states A as its source."""
    generator = torch.Generator().manual_seed(seed)
    networks = {name: copy.deepcopy(getattr(A, name)) for name in ("G", "D", "G_ema")}
    for network in networks.values():
        with torch.no_grad():
            for parameter in network.parameters() if network is not None else ():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(amount * parameter.square().mean().sqrt() * noise)
    origin = Provenance("finetune", f"b{seed}.pkl", f"{seed}" * 64, 1, parent=A.provenance.to_dict())
    return dataclasses.replace(A, **networks, provenance=origin)


@pytest.fixture(scope="module")
def B(A):  # noqa: N802
    return descendant(A)


def equal(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return [name for name in a if torch.equal(a[name], b[name])]


@pytest.mark.parametrize(("alpha", "which"), [(0.0, 0), (1.0, 1), ({4: 0.0}, 0), ({4: 1.0}, 1)])
def test_blend_is_exact_at_its_ends(A, B, alpha, which):
    blended, parent = blend(A, B, alpha), (A, B)[which]
    assert blended.missing == A.missing
    for name in set(("G", "D", "G_ema")) - set(A.missing):
        assert len(equal(getattr(blended, name), getattr(parent, name))) == len(tensors_of(getattr(A, name)))


def test_blend_halfway(A, B):
    a, b, half = (tensors_of(side.best) for side in (A, B, blend(A, B, 0.5)))
    for name in a:
        assert torch.allclose(half[name], (a[name] + b[name]) / 2, atol=1e-6), name


def test_blend_swaps_layers(A, B):
    low, high = blend(A, B, {4: 0.0, 16: 1.0}), blend(A, B, {4: 1.0, 16: 0.0, "mapping": 0.0})
    from_a, from_b = set(equal(low.best, A.best)), set(equal(low.best, B.best))
    assert all(name.startswith("mapping.") or name in from_b for name in set(tensors_of(A.best)) - from_a)
    if A.family == "stylegan2":
        assert {"mapping.fc0.weight", "synthesis.b8.conv0.weight"} <= from_a - from_b
        assert "synthesis.b16.conv0.weight" in from_b - from_a
    assert set(equal(high.best, A.best)) >= {name for name in from_a if name.startswith("mapping.")}
    for name in (name for name in tensors_of(A.best) if name.startswith("synthesis.")):
        assert (name in from_a) == (name in set(equal(high.best, B.best))), name


@pytest.mark.parametrize("alpha", [{}, {"mapping": 0.5}, {2: 0.0}, {64: 0.0}, {4: 0.0, 31: 1.0}])
def test_blend_refuses_other_resolutions(A, B, alpha):
    with pytest.raises(ConfigError, match=r"--alpha: resolutions .* the powers of two from 4 to 32"):
        blend(A, B, alpha)


def test_blend_keeps_both_parents(small, tmp_path):
    A, B = small, descendant(small)
    B = dataclasses.replace(B, provenance=dataclasses.replace(B.provenance, licence="CC0"))
    for path in (tmp_path / "c.pkl", tmp_path / "c.safetensors"):
        save(blend(A, B, 0.25), path)
        again = finetune.load(path)
        assert again.provenance.parent["sha256"] == A.provenance.sha256
        assert again.provenance.blended_with["sha256"] == B.provenance.sha256
        assert again.provenance.blended_with["parent"]["sha256"] == A.provenance.sha256
        assert again.provenance.training == {"alpha": 0.25} and again.provenance.licence == "MIT; CC0"
    unknown = dataclasses.replace(B, provenance=dataclasses.replace(B.provenance, licence=None))
    assert blend(unknown, A, 0.5).provenance.licence == "not known; MIT"
    assert blend(unknown, unknown, 0.5).provenance.licence is None
    save(blend(again, A, 0.5), tmp_path / "d.pkl")
    twice = finetune.load(tmp_path / "d.pkl").provenance
    assert twice.parent["blended_with"]["sha256"] == B.provenance.sha256
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "c.pkl")])
    assert f"blended with  b1.pkl (sha256 {'1' * 64})" in result.output


def test_provenance_of_endless_blends_is_cut():
    entry: dict = {}
    for _ in range(300):
        entry = {"blended_with": entry, "source": "x\ny"}
    step = Provenance.from_entry(entry, source="f", sha256="0", size=1).to_dict()
    depth = 0
    while step := step.get("blended_with"):
        depth += 1
        assert "\n" not in step["source"]
    assert depth == MAX_BLENDS


def test_weight_distance(A, B):
    assert weight_distance(A.best, A.best) == 0
    assert 0.05 < weight_distance(A.best, B.best) < 0.2
    other = copy.deepcopy(A.best)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].reshape(parameter.shape))
    assert weight_distance(A.best, other) == pytest.approx(math.sqrt(2), abs=0.1)


def test_relation_by_provenance_or_distance(A, B):
    assert relation(A, B).ancestor == A.provenance.source
    unknown = Provenance("finetune", "x.pkl", "f" * 64, 1)
    near, far = descendant(A, 2), descendant(A, 3, amount=10)
    assert relation(A, dataclasses.replace(near, provenance=unknown)).ancestor is None
    assert relation(A, dataclasses.replace(near, provenance=unknown))
    assert not relation(A, dataclasses.replace(far, provenance=unknown))
    assert relation(B, far).ancestor == A.provenance.source


def test_blend_command(small, golden_dir, tmp_path):
    path, far, out = tmp_path / "a.pkl", tmp_path / "far.pkl", tmp_path / "c.pkl"
    save(small, path)
    unknown = Provenance("finetune", "x", "", 0)
    save(dataclasses.replace(descendant(small, amount=20), provenance=unknown), far)
    words = ["blend", str(path), str(far), "--out", str(out)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "are not related: no common ancestor, distance of the weights 1." in result.output
    assert not out.exists()
    result = CliRunner().invoke(cli, [*words, "--force", "--alpha", "4=0,16=0.5,mapping=0"])
    assert result.exit_code == 0 and f"Wrote {out}: G_ema. No common ancestor known" in result.output
    words = ["blend", str(path), str(path), "--alpha", "0.1", "--out", str(out)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and f"{out}: exists. Move it" in result.output
    result = CliRunner().invoke(cli, [*words, "--force"])
    assert result.exit_code == 0 and "Warning" not in result.stderr
    for alpha in ("much", "4=x", "nan", "x=1"):
        result = CliRunner().invoke(cli, ["blend", str(path), str(path), "--alpha", alpha, "--out", str(far)])
        assert result.exit_code == 2 and "is not a number, or numbers by resolution" in result.output
    other = str(golden_dir / "stylegan3-t-32.pkl")
    result = CliRunner().invoke(cli, ["blend", str(path), other, "--out", str(tmp_path / "e.pkl")])
    assert result.exit_code == 2 and "the networks differ in" in result.output
