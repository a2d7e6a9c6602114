from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.cli import cli
from finetune.errors import ConfigError, ExportError
from finetune.export import onnx as to
from finetune.export.save import save
from finetune.models.stylegan2 import Generator
from finetune.sampling import generate, to_uint8, z_from_seeds

pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

pytestmark = pytest.mark.skipif(torch.__version__ < to.MIN_TORCH, reason=f"needs torch {to.MIN_TORCH}")
ROOT = Path(__file__).parents[2]
SIZES = dict(z_dim=8, c_dim=2, w_dim=8, img_resolution=4, img_channels=3)
METADATA = {"license": "CC0-1.0", "network": "G_ema"}
C = torch.eye(2)[[0, 1, 0]]


def tiny(seed: int = 0, **changes):
    torch.manual_seed(seed)
    sizes = {**SIZES, **changes}
    G = Generator(**sizes, channel_base=32, channel_max=8, mapping_kwargs={"num_layers": 2}).eval()
    for name, tensor in (*G.named_parameters(), *G.named_buffers()):
        if name.endswith(("noise_strength", "w_avg")):
            tensor.data.normal_()
    return G.requires_grad_(False)


def run(model, outputs=None, **inputs):
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {name: np.asarray(x, np.float32) for name, x in inputs.items()})


def export(G):
    return to.join(*(to.to_onnx(G, part) for part in to.PARTS))


@pytest.fixture(scope="module")
def exported():
    model = export(tiny())
    to.add_metadata(model, METADATA)
    return model


@pytest.fixture(scope="module")
def blended():
    return {part: to.to_onnx(tiny(0), part, original=tiny(1)) for part in to.PARTS}


@pytest.mark.parametrize("psi", [1, 0.5, 0])
def test_onnx_images(exported, psi):
    onnx.checker.check_model(exported)
    assert [entry.version for entry in exported.opset_import if not entry.domain] == [to.OPSET]
    assert {entry.key: entry.value for entry in exported.metadata_props} == METADATA
    z = z_from_seeds(range(3), 8)
    img, ws = run(exported, z=z, c=C, truncation_psi=psi)
    G = tiny()
    assert_close(img, G(z, C, truncation_psi=psi, noise_mode="const"), NETWORK_F32)
    assert_close(ws, G.mapping(z, C, truncation_psi=psi), NETWORK_F32)
    one = run(exported, z=z[1:2], c=C[1:2], truncation_psi=psi)[0]
    assert_close(one, img[1:2], NETWORK_F32)


@pytest.mark.slow
def test_onnx_given_noise():
    G = tiny(img_resolution=8)
    exported = export(G)
    maps = [tensor for name, tensor in G.synthesis.named_buffers() if name.endswith("noise_const")]
    z = z_from_seeds(range(3), 8)
    assert len(maps) == 3
    for rows in (1, 3):
        noise = torch.randn([rows, sum(x.numel() for x in maps)])
        img = run(exported, ["img"], z=z, c=C, truncation_psi=1, noise=noise)[0]
        for i in range(3):
            first = 0
            for x in maps:
                x.copy_(noise[i % rows, first : first + x.numel()].reshape(x.shape))
                first += x.numel()
            assert_close(img[i], G(z[i : i + 1], C[i : i + 1], noise_mode="const")[0], NETWORK_F32)


def test_onnx_cut_at_ws(exported):
    """onnx.utils.extract_model, as the documentation has it."""
    inputs = [value.name for value in exported.graph.input]
    extractor = onnx.utils.Extractor(exported)
    mapping = extractor.extract_model(inputs[:3], ["ws"])
    synthesis = extractor.extract_model(["ws", *inputs[3:]], ["img"])
    z = z_from_seeds(range(3), 8)
    ws = run(mapping, z=z, c=C, truncation_psi=0.7)[0]
    img = run(synthesis, ws=ws)[0]
    assert np.array_equal(img, run(exported, ["img"], z=z, c=C, truncation_psi=0.7)[0])


@pytest.mark.slow
def test_onnx_blend(blended):
    ours, theirs = tiny(0), tiny(1)
    middle = copy.deepcopy(ours)
    for name, tensor in middle.state_dict().items():
        tensor.copy_(0.25 * ours.state_dict()[name] + 0.75 * theirs.state_dict()[name])
    z = z_from_seeds(range(3), 8)
    for alpha, G in ((0, theirs), (0.25, middle), (1, ours)):
        ws = run(blended["mapping"], z=z, c=C, truncation_psi=0.7, alpha=alpha)[0]
        img = run(blended["synthesis"], ws=ws, alpha=alpha)[0]
        assert_close(img, G(z, C, truncation_psi=0.7, noise_mode="const"), NETWORK_F32, f"alpha {alpha}")


def test_onnx_blend_refuses_other_shapes():
    with pytest.raises(ConfigError, match=re.escape("synthesis.b8.conv0.affine.bias is [8], here absent")):
        to.to_onnx(tiny(), "synthesis", original=tiny(img_resolution=8))


def test_onnx_of_one_generator_only(golden_checkpoint, tmp_path):
    checkpoint = golden_checkpoint("stylegan2-64-cond")
    with pytest.raises(ExportError, match="one generator, not G, D, G_ema"):
        save(checkpoint, tmp_path / "x.onnx", which="all")
    with pytest.raises(ConfigError, match=r"onnx with half: needs float32 weights. Use one of safetensors, "):
        save(checkpoint, tmp_path / "x.onnx", half=True)
    assert list(tmp_path.iterdir()) == []


def test_onnx_refuses_difference(exported, golden_checkpoint, tmp_path, monkeypatch):
    source = golden_checkpoint("stylegan2-64-cond")
    source = dataclasses.replace(source, G=None, D=None, G_ema=tiny(1), augment_pipe=None)
    monkeypatch.setattr(to, "to_onnx", lambda *args: None)
    monkeypatch.setattr(to, "join", lambda *args: exported)
    monkeypatch.setattr(to, "metadata_of", lambda checkpoint: {})
    with pytest.raises(ExportError, match=r"image 0 of G_ema differs by \S+ in the written file"):
        save(source, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_packages(golden_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = ["export", "--network", golden_dir / "stylegan2-32.pkl", "--out", tmp_path / "x.onnx"]
    result = CliRunner().invoke(cli, [*map(str, args), "--format", "onnx"])
    assert result.exit_code == 2
    assert "ONNX needs onnx, onnxscript, onnxruntime" in result.output
    assert "pip install 'stylegan-finetune[onnx]'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_onnx_refuses_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cu124"))
    with pytest.raises(ConfigError, match=r"torch 2.6.0\+cu124: too old for ONNX"):
        to.require_packages()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stylegan2-64-cond", "stylegan3-t-32", "stylegan3-r-32"])
def test_onnx_export_command(golden_dir, tmp_path, name):
    args = [
        "export",
        "--network",
        golden_dir / f"{name}.pkl",
        "--format",
        "onnx",
        "--out",
        tmp_path / "x.onnx",
    ]
    result = CliRunner().invoke(cli, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    compared = re.search(r"compared: 8 images, largest difference (\S+) \(of values", result.output)
    assert compared and 0 <= float(compared[1]) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"x.onnx"}
    metadata = to.OnnxGenerator(tmp_path / "x.onnx").session.get_modelmeta().custom_metadata_map
    assert metadata["network"] == "G_ema" and metadata["family"] in name
    assert json.loads(metadata["finetune"])["source"]["source"] == f"{name}.pkl"


@pytest.mark.slow
def test_onnx_documentation(tmp_path, monkeypatch):
    """The code of docs/onnx.md gives the image of `finetune generate`."""
    checkpoint = finetune.load(ROOT / "finetune" / "demo" / "faces-3d-64.pkl")
    monkeypatch.chdir(tmp_path)
    save(checkpoint, "faces.onnx")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text("utf-8"), re.DOTALL):
        exec(code, names)
    ((_, expected),) = generate(checkpoint.best, [7], truncation_psi=0.7)
    assert np.abs(to_uint8(torch.from_numpy(names["img"]))[0].astype(int) - expected).max() <= 1
    assert (tmp_path / "mapping.onnx").exists() and (tmp_path / "synthesis.onnx").exists()
