"""`finetune inspect`: describe a checkpoint, without executing anything in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.export import step_text
from finetune.cli.options import NETWORK, network_file, offline_option

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint

SHOWN_CLASSES = 20  # names, in the text


@click.command("inspect", short_help="Describe a checkpoint, without executing anything in it.")
@click.argument("network", metavar=NETWORK)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@offline_option()
def command(network: str, as_json: bool) -> None:
    """Describe a checkpoint, or the newest snapshot of a run folder.

    Generation, architecture, sizes, precision, provenance, and missing networks. The networks are
    built and every tensor is checked, so a file that passes can be used; nothing in it is executed.
    """
    from finetune.resolve import load

    path = network_file(network)
    facts = describe(path, load(path))
    click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))


def describe(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint as plain values. The keys are stable, for use by scripts."""
    from finetune.models import image_size

    generator, network = checkpoint.best, checkpoint.network
    height, width = image_size(network)
    options = network.init_kwargs  # the constructor arguments, all of them by name
    present = {name: getattr(checkpoint, name) for name in ("G", "D", "G_ema")}
    return {
        "file": str(path),
        "generation": checkpoint.provenance.generation,
        "architecture": checkpoint.family,
        "variant": options.get("architecture"),
        "resolution": network.img_resolution,
        "width": width,
        "height": height,
        "channels": network.img_channels,
        "classes": network.c_dim,
        "labels": checkpoint.label_kind,
        "class_names": list(checkpoint.class_names),
        "z_dim": getattr(generator, "z_dim", None),
        "w_dim": getattr(generator, "w_dim", None),
        "num_ws": getattr(generator, "num_ws", None),
        "parameters": {
            name: None if module is None else sum(p.numel() for p in module.parameters())
            for name, module in present.items()
        },
        "precision": {
            "weights": str(next(network.parameters()).dtype).removeprefix("torch."),
            "num_fp16_res": options.get("num_fp16_res"),
            "conv_clamp": options.get("conv_clamp"),
        },
        "augment_pipe": checkpoint.augment_pipe is not None,
        "training_set_kwargs": checkpoint.training_set_kwargs,
        "missing": checkpoint.missing,
        "notes": list(checkpoint.notes),
        "provenance": checkpoint.provenance.to_dict(),
    }


GENERATIONS = {
    "tf": "TensorFlow (stylegan2, stylegan2-ada)",
    "ada": "stylegan2-ada-pytorch",
    "sg3": "stylegan3",
    "rosinality": "the StyleGAN2 port by rosinality",
    "state-dict": "torch.save (a state dict)",
    "finetune": "finetune",
}


def as_text(facts: dict[str, Any]) -> str:
    """Return the same facts as lines of `name  value`."""
    source = facts["provenance"]
    count = facts["parameters"]
    lines = [
        ("file", facts["file"]),
        ("generation", f"{facts['generation']}: written by {GENERATIONS[facts['generation']]}"),
        ("architecture", " ".join(filter(None, (facts["architecture"], facts["variant"])))),
        ("resolution", _resolution(facts["width"], facts["height"])),
        ("channels", facts["channels"]),
        _labels(facts),
        ("latents", _latents(facts)),
        ("parameters", ", ".join(f"{name} {num:,}" for name, num in count.items() if num is not None)),
        ("precision", _precision(facts["precision"])),
        ("augmentation", "augment_pipe present" if facts["augment_pipe"] else "none"),
        ("missing", ", ".join(facts["missing"]) or "nothing"),
        ("size", f"{source['size']:,} bytes"),
        ("sha256", source["sha256"]),
        ("license", source["licence"] or "not known"),
    ]
    if source["nimg"] is not None:
        lines.append(("trained for", f"{source['nimg'] / 1000:,.1f} kimg"))
    if source.get("blended_with"):
        lines.append(("blended with", step_text(source["blended_with"])))
    for generation, parent in enumerate(_ancestors(source)):
        lines.append(("started from" if generation == 0 else "before that", step_text(parent)))
        if parent.get("blended_with"):
            lines.append(("blended with", step_text(parent["blended_with"])))
    lines += [("note", note) for note in facts["notes"]]
    return "\n".join(f"{name:<14}{value}" for name, value in lines)


def _labels(facts: dict[str, Any]) -> tuple[str, Any]:
    from finetune.checkpoint.unpickle.stubs import printable

    if facts["labels"] == "vectors":
        return "labels", f"vectors of {facts['classes']} numbers"
    if names := [printable(name) for name in facts["class_names"]]:
        more = ", …" if len(names) > SHOWN_CLASSES else ""
        return "classes", f"{facts['classes']}: {', '.join(names[:SHOWN_CLASSES])}{more}"
    return "classes", facts["classes"] or "none (unconditional)"


def _resolution(width: int, height: int) -> str:
    return f"{width} x {height}" + ("" if width == height else " (width x height)")


def _latents(facts: dict[str, Any]) -> str:
    if facts["num_ws"] is None:
        return "none (no generator)"
    return f"z {facts['z_dim']}, w {facts['w_dim']}, {facts['num_ws']} ws"


def _precision(precision: dict[str, Any]) -> str:
    half = precision["num_fp16_res"]
    layers = f"the {half} highest resolutions run in float16 on CUDA" if half else "all layers run in float32"
    clamp = precision["conv_clamp"]
    return f"{precision['weights']} weights; {layers}; " + (
        "no clamping" if clamp is None else f"clamped at {clamp:g}"
    )


def _ancestors(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while provenance := provenance["parent"]:
        found.append(provenance)
    return found
