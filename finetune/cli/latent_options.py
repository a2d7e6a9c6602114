"""Options that choose latents, for `generate` and `video`: seeds or saved w, and how they are varied."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import LocalPath, NumberRange, Vector, seeds_option
from finetune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from finetune.checkpoint.load import Checkpoint
    from finetune.editing.latents import LatentTable
    from finetune.models import Network

PSI_LIMIT = 10
# Few enough pixels that plain torch makes them sooner than the kernels are built (half a minute); StyleGAN3
# takes some thirty times as long without kernels, StyleGAN2 hardly longer.
QUICK_PIXELS = {"stylegan2": 1 << 22, "stylegan3-t": 1 << 14, "stylegan3-r": 1 << 14}


class Truncations(Vector):
    """Values of psi written like `0.7` or `0,0.5,1`; the value is a list of floats."""

    name = "psi"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "PSI[,PSI…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        psis = super().convert(value, param, ctx)
        for psi in psis:
            if abs(psi) > PSI_LIMIT:
                self.fail(f"{psi:g} is outside -{PSI_LIMIT} to {PSI_LIMIT}.", param, ctx)
        return psis


class EditType(click.ParamType):
    """An edit like `pc1=2.0`, `pc1=-3,0,3` or `pc1=2@0-3`; the value is (name, amounts, layers or None)."""

    name = "edit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"([\w.-]+)=([^=@]+)(?:@([^=@]+))?", value)
        if match is None:
            self.fail(f"{value!r} is not an edit. Write it like pc1=2.0.", param, ctx)
        return match[1], tuple(Vector().convert(match[2], param, ctx)), match[3]


def label_option(help: str = "Label, like 1,180, for a checkpoint whose labels are vectors."):
    """Add `--label`: a list of floats."""
    return click.option("--label", type=Vector(), help=help)


LATENT_OPTIONS = (
    seeds_option(required=False, help="Seeds, like 0-15,42; a seed always gives the same image."),
    click.option(
        "--w",
        "w_files",
        multiple=True,
        type=LocalPath(path_type=Path),
        metavar="FILE",
        help="Saved w (.npz of --save-w or `finetune project`) in place of seeds; may be repeated.",
    ),
    click.option(
        "--trunc",
        "psis",
        type=Truncations(),
        default="1",
        show_default=True,
        help="Truncation: 1 is full variety, 0 the average image.",
    ),
    click.option(
        "--trunc-cutoff",
        type=click.IntRange(min=0),
        metavar="N",
        help="Truncate only the first N rows of ws (coarse features).  [default: all]",
    ),
    click.option(
        "--class",
        "classes",
        type=NumberRange("class"),
        help="Classes, like 2 or 0-4, for a checkpoint that has classes.",
    ),
    label_option(),
    click.option(
        "--edit",
        "edits",
        multiple=True,
        type=EditType(),
        metavar="NAME=X[,X…][@ROWS]",
        help="Move w by X standard deviations along a direction: pc1, pc2 … or those of --directions; "
        "@0-3: only in these rows of ws. May be repeated.",
    ),
    click.option(
        "--directions",
        type=LocalPath(path_type=Path),
        metavar="FILE",
        help="Directions for --edit, written by `finetune directions`.  [default: those of the network]",
    ),
    click.option(
        "--noise-mode",
        type=click.Choice(["const", "random", "none"]),
        default="const",
        show_default=True,
        help="StyleGAN2's noise: the stored maps, maps drawn from the seed, or none.",
    ),
)


def latent_options(function):
    """Add the options of this file; they reach the command as keywords that `latent_table` takes."""
    for option in reversed(LATENT_OPTIONS):
        function = option(function)
    return function


def generator_of(checkpoint: Checkpoint) -> Network:
    """Return the generator to make images with, and print if it is not an average."""
    G = checkpoint.generator
    if checkpoint.G_ema is None:
        click.echo("The checkpoint has no G_ema; the images come from G.", err=True)
    return G


def start_without_build(checkpoint: Checkpoint, num_images: int) -> None:
    """For few images, run in plain torch if the CPU kernels are not built yet, and build them meanwhile."""
    from finetune.models import image_size
    from torch_utils import custom_ops
    from torch_utils.ops import impl

    G: Network = checkpoint.best
    is_quick = math.prod(image_size(G)) * num_images <= QUICK_PIXELS[checkpoint.family]
    if is_quick and next(G.parameters()).device.type == "cpu" and impl.default_impl() == "auto":
        custom_ops.build_for_next_start()


def latent_table(
    checkpoint: Checkpoint,
    *,
    seeds: list[int] | None,
    w_files: tuple[Path, ...],
    psis: list[float],
    trunc_cutoff: int | None,
    classes: list[int] | None,
    label: list[float] | None,
    edits: tuple[tuple[str, tuple[float, ...], str | None], ...],
    directions: Path | None,
    mix_seeds: list[int] | None = None,
    mix_layers: str | None = None,
) -> LatentTable:
    """Return the latents that the options name; ConfigError for options that do not fit the network."""
    import torch

    from finetune.editing.directions import find_directions
    from finetune.editing.latents import Edit, LatentTable, columns, load_ws, parse_layers

    if bool(seeds) == bool(w_files):
        raise ConfigError("--seeds, --w: exactly one is needed. Use either --seeds or --w.")
    if w_files and (classes or label) and not mix_seeds:
        raise ConfigError("--class and --label have no effect on --w: the label is part of w. Omit them.")
    if directions is not None and not edits:
        raise ConfigError("--directions has no effect without --edit. Omit it, or name an edit.")
    if mix_layers is not None and not mix_seeds:
        raise ConfigError("--mix-layers has no effect without --mix. Omit it, or name seeds to mix with.")
    G: Network = checkpoint.best
    if seeds or mix_seeds:
        labels = labels_of(checkpoint, classes, label)
    else:
        labels = [("", torch.zeros(1, G.c_dim))]  # not used
    if edits and directions is None and label is None and checkpoint.label_kind == "vectors":
        raise ConfigError(
            "--edit: the principal directions of this network depend on the label. Use --directions with a "
            "file of `finetune directions --label`."
        )
    found = find_directions(G, dict.fromkeys(name for name, _, _ in edits), directions, label)
    moves = [
        Edit(name, found[name], amounts, slice(None) if layers is None else parse_layers(layers, G.num_ws))
        for name, amounts, layers in edits
    ]
    return LatentTable(
        G,
        list(seeds) if seeds else [ws for file in w_files for ws in load_ws(file, G)],
        columns(G, labels, psis=psis, edits=moves, mix_seeds=mix_seeds or ()),
        cutoff=trunc_cutoff,
        mix_layers=parse_layers(mix_layers, G.num_ws) if mix_layers else slice(G.num_ws // 2),
    )


def labels_of(
    checkpoint: Checkpoint, classes: list[int] | None, label: list[float] | None
) -> list[tuple[str, torch.Tensor]]:
    """Return names and labels; ConfigError for a `--class` or `--label` that the network cannot take."""
    from finetune.sampling import label_from_class, label_from_vector

    G: Network = checkpoint.best
    if label is not None:
        if classes is not None:
            raise ConfigError("--class and --label: an image has one label. Use one of the two.")
        if checkpoint.label_kind == "classes":
            raise ConfigError(f"--label: the labels of this network are {G.c_dim} classes. Use --class.")
        return [("", label_from_vector(G, label))]
    if checkpoint.label_kind == "vectors":
        given = "" if classes is None else "--class: "
        raise ConfigError(
            f"{given}the labels of this network are vectors of {G.c_dim} numbers. "
            f"Use --label {','.join(['0'] * G.c_dim)} with the numbers of your choice."
        )
    if not classes:
        return [("", label_from_class(G, None))]
    return [(f"class{index}", label_from_class(G, index)) for index in classes]


def print_options_without_effect(table: LatentTable, noise_mode: str) -> None:
    """Print a line for each option that changes nothing for this network."""
    from finetune.sampling import has_noise

    cutoff, num_ws = table.cutoff, table.G.num_ws
    lines = []
    if noise_mode != "const" and not has_noise(table.G):
        lines.append(f"--noise-mode {noise_mode} has no effect: this network adds no noise.")
    if cutoff is not None and all(column.psi == 1 for column in table.columns):
        lines.append(f"--trunc-cutoff {cutoff} has no effect without --trunc.")
    elif cutoff == 0:
        lines.append("--trunc has no effect with --trunc-cutoff 0.")
    elif cutoff is not None and cutoff >= num_ws:
        lines.append(f"--trunc-cutoff {cutoff} has no effect: this network has {num_ws} rows of ws.")
    for line in lines:
        click.echo(line, err=True)
