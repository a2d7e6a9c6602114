"""Commands refuse to replace a file that would be lost, unless --force is given."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from finetune.cli import cli

COMMANDS = [
    ("generate --network net.pkl --seeds 0 --outdir out --save-w w.npz", "w.npz", "w.npz"),
    ("video --network net.pkl --seeds 0,1 --out walk.webp", "walk.webp", "walk.webp"),
    ("video --network net.pkl --seeds 0,1 --out frames", "frames/frame00000.png", "frames"),
    ("project face.png --network net.pkl --outdir out", "out/face.npz", "out/face.npz"),
    ("project face.png --network net.pkl --outdir out --tune 1", "out/tuned.pkl", "out/tuned.pkl"),
    ("directions --network net.pkl --outdir out", "out/directions.npz", "out/directions.npz"),
    ("blend net.pkl net.pkl --out half.pkl", "half.pkl", "half.pkl"),
    ("export --network net.pkl --out new.pkl", "new.pkl", "new.pkl"),
    ("export --network net.pkl --format web --out page", "page/index.html", "page"),
    ("convert net.pkl new.safetensors", "new.safetensors", "new.safetensors"),
    ("dataset prepare images set.zip", "set.zip", "set.zip"),
    ("ema run", "run/network-ema.pkl", "run/network-ema.pkl"),
]


@pytest.mark.parametrize(("words", "file", "named"), COMMANDS, ids=[words for words, _, _ in COMMANDS])
def test_command_replaces_only_with_force(tmp_path, monkeypatch, words, file, named):
    monkeypatch.chdir(tmp_path)
    for path in ("net.pkl", "face.png", "run/network-snapshot-000001.pkl", "images/a.png", file):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"old")
    message = f"{named}: exists. Move it, write elsewhere, or use --force to replace it."
    refused = CliRunner().invoke(cli, words.split())
    assert refused.exit_code == 2 and message in refused.output, refused.output
    forced = CliRunner().invoke(cli, [*words.split(), "--force"])
    assert forced.exit_code == 2 and message not in forced.output  # as net.pkl is no network
    assert (tmp_path / file).read_bytes() == b"old"


def test_empty_folder_is_free(tmp_path):
    words = ["video", "--network", "absent.pkl", "--seeds", "0,1", "--out", str(tmp_path)]
    assert "absent.pkl does not exist" in CliRunner().invoke(cli, words).output
