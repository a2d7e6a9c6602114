from __future__ import annotations

import torch
from click.testing import CliRunner

import finetune
from finetune.checkpoint.rebuild import tensors_of
from finetune.cli import cli
from finetune.models import stylegan3


def run(*args, code=0):
    result = CliRunner().invoke(cli, ["convert", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_convert_port_to_pickle_and_back(golden_dir, tmp_path):
    source = golden_dir / "rosinality-32.pt"
    output = run(source, tmp_path / "net.pkl")
    assert "stylegan-pkl): G_ema." in output and "largest difference 0 " in output
    assert "Note: G_ema: architecture read off its tensors; assumed conv_clamp=None" in output
    output = run(tmp_path / "net.pkl", tmp_path / "again.pt", "--half")
    assert "(of values in -1 to 1)" in output and "largest difference 0 " not in output
    ours = torch.load(tmp_path / "again.pt", weights_only=True)
    theirs = torch.load(source, weights_only=True)
    assert torch.equal(ours["latent_avg"], theirs["latent_avg"])
    weight = "convs.0.conv.weight"
    assert torch.equal(ours["g_ema"][weight], theirs["g_ema"][weight].half())


def test_convert_with_arguments_that_tensors_do_not_tell(tmp_path):
    G = stylegan3.Generator(8, 0, 8, 16, 3, channel_base=128, channel_max=8, num_layers=4, first_cutoff=1.5)
    torch.save(G.state_dict(), tmp_path / "net.pth")
    output = run(tmp_path / "net.pth", tmp_path / "net.safetensors", code=2)
    assert "--arch NAME=VALUE" in output and "first_cutoff" in output
    run(tmp_path / "net.pth", tmp_path / "net.safetensors", "--arch", "first_cutoff=1.5")
    again = finetune.load(tmp_path / "net.safetensors").G_ema
    assert all(map(torch.equal, tensors_of(G).values(), tensors_of(again).values()))


def test_convert_refusals(golden_dir, tmp_path):
    source = golden_dir / "stylegan3-t-32.pkl"
    for args, words in (
        ((source, tmp_path / "net.jpg"), "unknown suffix '.jpg'. Use one of .pkl (stylegan-pkl)"),
        ((source, tmp_path / "net.pt"), "StyleGAN2 port: StyleGAN3, not StyleGAN2"),
        ((source, tmp_path / "net.pkl", "--arch", "first_cutoff"), "'first_cutoff' is not an argument"),
        ((source, tmp_path / "net.pkl", "--arch", "first_cutoff=1"), "no architecture can be given"),
        ((source, tmp_path / "net.pkl", "--half"), "stylegan-pkl with --half"),
    ):
        assert words in run(*args, code=2)
    assert list(tmp_path.iterdir()) == []
