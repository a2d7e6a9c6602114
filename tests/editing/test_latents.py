from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import finetune
from finetune.directions import principal_directions
from finetune.editing.directions import find_directions, save_directions
from finetune.editing.latents import (
    Edit,
    LatentTable,
    columns,
    load_ws,
    parse_layers,
    save_ws,
    truncate,
)
from finetune.errors import ConfigError
from finetune.sampling import label_from_class, z_from_seeds


@pytest.fixture(scope="module")
def G(golden_dir):  # noqa: N802
    return finetune.load(golden_dir / "stylegan2-32.pkl").G_ema


@pytest.fixture(scope="module")
def labels(G):
    return [("", label_from_class(G, None))]


@pytest.mark.parametrize(("psi", "cutoff"), [(1.0, None), (0.5, None), (0.0, 3), (-1.0, 2), (0.7, 0)])
def test_table_equals_the_mapping_network(G, labels, psi, cutoff):
    table = LatentTable(G, [3, 4], columns(G, labels, psis=[psi]), cutoff)
    z = z_from_seeds([4], G.z_dim)
    expected = G.mapping(z, labels[0][1], truncation_psi=psi, truncation_cutoff=cutoff)[0]
    assert torch.equal(list(table)[1][0], expected)
    saved = G.mapping(z, labels[0][1])[0]
    assert torch.equal(truncate(G, saved, psi, cutoff), expected)
    assert table.row_names() == ["seed0003", "seed0004"] and table.noise_seeds() == [3, 4]


def test_table_mixes_then_edits(G, labels):
    direction = torch.arange(G.w_dim, dtype=torch.float32)
    edit = Edit("pc1", direction, (0.0, 2.0), slice(1, 3))
    table = LatentTable(G, [0], columns(G, labels, edits=[edit], mix_seeds=[7]), None, slice(2))
    names = ["pc1=0", "pc1=0-mix0007", "pc1=2", "pc1=2-mix0007"]
    assert [column.name for column in table.columns] == names
    plain, mixed, _, edited = next(iter(table))
    other = next(iter(LatentTable(G, [7], columns(G, labels))))[0]
    assert torch.equal(mixed[:2], other[:2]) and torch.equal(mixed[2:], plain[2:])
    assert torch.equal(edited[1:3], mixed[1:3] + 2 * direction)
    assert torch.equal(edited[3:], mixed[3:])


def test_table_too_many_columns(G, labels):
    with pytest.raises(ConfigError, match="40,000 combinations"):
        columns(G, labels, psis=[0.5] * 200, mix_seeds=range(199))


def test_ws_file_round_trip(G, tmp_path):
    ws = torch.randn(2, G.num_ws, G.w_dim)
    save_ws(tmp_path / "a.npz", ws)
    assert all(torch.equal(a, b) for a, b in zip(load_ws(tmp_path / "a.npz", G), ws, strict=True))
    np.savez(tmp_path / "b.npz", w=ws[:, 0].double().numpy())
    assert torch.equal(load_ws(tmp_path / "b.npz", G)[1], ws[1, :1].expand(G.num_ws, -1))


def damaged_archive():
    stream = io.BytesIO()
    np.savez_compressed(stream, w=np.zeros([1, 8]))
    data = bytearray(stream.getvalue())
    start = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    data[start] ^= 0xFF  # the first byte of the compressed array
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": np.zeros([1, 2, 3])}, r"w has the shape \[1, 2, 3\]; this network takes \[N, "),
        ({"w": np.array(["a"])}, "w holds no real numbers"),
        ({"w": np.full([1, 1, 1], "a")}, "w holds no real numbers"),
        ({"x": np.zeros(1)}, r"not an \.npz file with w \(no array called w\)"),
        ({"w": np.array([np.nan])}, "w is not finite"),
        ({"w": np.array([{}])}, "allow_pickle"),
        (b"no archive", r"not an \.npz file with w \(it is not a zip of arrays\)\.$"),
        (damaged_archive(), r"not an \.npz file with w \(Error -3 while decompressing"),
        (None, "does not exist"),
    ],
)
def test_ws_file_refusals(G, tmp_path, content, message):
    path = tmp_path / "w.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(ConfigError, match=message):
        load_ws(path, G)


@pytest.mark.parametrize("text", ["", "a", "3-1", "8", "0-8", "-1", "1-"])
def test_parse_layers_refuses(text):
    with pytest.raises(ConfigError, match="from 0 to 7"):
        parse_layers(text, 8)


def test_directions_by_name(G, tmp_path):
    found = principal_directions(G, 3)
    own = find_directions(G, ["pc3", "pc1"])
    assert torch.allclose(own["pc3"], found.vectors[2] * found.std[2])
    save_directions(tmp_path / "d.npz", found)
    assert torch.equal(find_directions(G, ["pc3"], tmp_path / "d.npz")["pc3"], own["pc3"])
    with pytest.raises(ConfigError, match=r"--edit pc4: .*d\.npz has the directions pc1, pc2, pc3"):
        find_directions(G, ["pc4"], tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", names=np.array(["x"]), vectors=np.zeros([1, 2]), std=np.zeros(1))
    with pytest.raises(ConfigError, match=r"vectors have the shape \[1, 2\], expected \[1,"):
        find_directions(G, ["x"], tmp_path / "e.npz")
