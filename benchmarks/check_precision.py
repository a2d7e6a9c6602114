"""Compare float16 layers, TF32 and split float32 with float32: images, logits, gradients, overflow.

    python benchmarks/check_precision.py --out benchmarks/results/precision_<machine>_<yyyymm>.md

Networks of random weights, called as in training, with float16 where published checkpoints have it, or with
TF32 or float32 split into TF32 products in place of float32, and the same networks with all layers in
float32; with plain torch and with the native kernels. Errors are in units of the largest value; of gradients
(of the logits of generated images, to every weight of G and D) the cosine. The exit code is 1 if a value is
not finite or a limit is passed. On a CPU everything is float32, so this is meaningful on CUDA only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from measuring import report, table

from finetune.device import float32_math
from finetune.models import stylegan2, stylegan3
from finetune.train.build import use_channels_last
from torch_utils.ops import impl

LARGEST_ERROR = 0.05  # eleven bits, and some twenty layers of them
LEAST_COSINE = 0.98
R_OPTIONS = dict(conv_kernel=1, use_radial_filters=True)


def networks(family: str, options: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return G and D of a family with float16 in the layers that published checkpoints have it in."""
    torch.manual_seed(options.seed)
    sizes = dict(channel_base=options.cbase, channel_max=options.cmax)
    if family == "stylegan2":
        G = stylegan2.Generator(64, 0, 64, options.resolution, 3, num_fp16_res=4, **sizes)
    else:
        more = R_OPTIONS if family == "stylegan3-r" else {}
        G = stylegan3.Generator(64, 0, 64, options.resolution, 3, num_fp16_res=4, **sizes, **more)
    D = stylegan2.Discriminator(0, options.resolution, 3, num_fp16_res=4, **sizes)
    for network in (G, D):
        use_channels_last(network)
    return G.to(options.device), D.to(options.device)


def step(G, D, z: torch.Tensor, force_fp32: bool) -> dict[str, torch.Tensor]:
    """Return images, logits, and all gradients of the logits in one row."""
    img = G(z, None, force_fp32=force_fp32, noise_mode="const", fused_modconv="pointwise")
    logits = D(img, None, force_fp32=force_fp32)
    weights = [p for net in (G, D) for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.nn.functional.softplus(-logits).sum(), weights, allow_unused=True)
    gradients = torch.cat([g.flatten().double() for g in found if g is not None])
    return {"images": img.detach().double(), "logits": logits.detach().double(), "gradients": gradients}


def compare(half: dict[str, torch.Tensor], single: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the errors of a lower precision, and whether they are small enough."""
    errors = {
        name: float((half[name] - single[name]).abs().max() / single[name].abs().max())
        for name in ("images", "logits")
    }
    cosine = float(torch.nn.functional.cosine_similarity(half["gradients"], single["gradients"], dim=0))
    finite = all(bool(torch.isfinite(value).all()) for value in half.values())
    fine = (
        finite
        and errors["images"] < LARGEST_ERROR
        and errors["logits"] < LARGEST_ERROR
        and cosine > LEAST_COSINE
    )
    return {**errors, "cosine of gradients": cosine, "finite": finite, "fine": fine}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--families", nargs="+", default=["stylegan2", "stylegan3-t", "stylegan3-r"])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--cbase", type=int, default=16384)
    parser.add_argument("--cmax", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = {}
    for family in options.families:
        G, D = networks(family, options)
        z = torch.randn(options.batch, G.z_dim, generator=torch.Generator().manual_seed(options.seed))
        z = z.to(device)
        for name in ("ref", "auto"):
            impl.set_default_impl(name)
            with float32_math():
                single, half = step(G, D, z, True), step(G, D, z, False)
            with float32_math(tf32=True):
                rounded = step(G, D, z, True)
            with float32_math(split=True):
                split = step(G, D, z, True)
            results[f"{family}, float16, {name}"] = compare(half, single)
            results[f"{family}, TF32, {name}"] = compare(rounded, single)
            results[f"{family}, split float32, {name}"] = compare(split, single)
            print(family, name, "done", file=sys.stderr, flush=True)
        impl.set_default_impl(None)
    columns = ["images", "logits", "cosine of gradients", "finite", "fine"]
    rows = [
        [
            name,
            *(f"{found[key]:.6g}" if isinstance(found[key], float) else str(found[key]) for key in columns),
        ]
        for name, found in results.items()
    ]
    text = report(
        "float16 layers, TF32 and split float32 against float32",
        device,
        options.seed,
        [table(["network, format, ops", *columns], rows)],
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if not all(found["fine"] for found in results.values()):
        sys.exit("float16 layers or TF32 differ too much from float32, or overflow: see the table")


if __name__ == "__main__":
    main()
