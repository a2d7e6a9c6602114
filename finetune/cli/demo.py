"""`finetune demo`: fine-tune the bundled checkpoint on the bundled images."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.cli.options import device_option, ops_option, outdir_option, seed_option
from finetune.demo import KIMG


@click.command("demo", short_help="Fine-tune the bundled checkpoint on the bundled images, offline.")
@outdir_option(required=False, default=Path("demo-out"), show_default=True)
@click.option(
    "--kimg",
    type=click.FloatRange(min=0, min_open=True),
    default=KIMG,
    show_default=True,
    help="Thousands of images of each of the two runs.",
)
@seed_option("Seed of both runs.")
@device_option(default="cpu")
@ops_option()
def command(outdir: Path, kimg: float, seed: int, device: str) -> None:
    """Fine-tune the bundled checkpoint on the bundled images, without and with self-distillation.

    Writes comparison.png (the same seeds from the checkpoint and both results), the two run folders and the
    exported pickle to --outdir, and prints the distances of generated images to the new ones. Takes three to
    four minutes on two CPU cores and needs no network.
    """
    from finetune.demo.run import run_demo

    result = run_demo(outdir, kimg=kimg, seed=seed, device=device)
    if not result.improved:
        raise SystemExit(1)
