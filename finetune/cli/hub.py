"""`finetune hub`: publish checkpoints on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune.cli.export import with_license
from finetune.cli.options import NETWORK, license_option, network_file
from finetune.errors import ConfigError
from finetune.export.formats import WHICH
from finetune.progress import progress_bar


@click.group("hub", short_help="Publish a checkpoint on the Hugging Face Hub.")
def command() -> None:
    """Publish checkpoints on the Hugging Face Hub (extra `hub`).

    Every command that takes a network also accepts hf://USER/REPO and hf://USER/REPO/FILE.
    """


@command.command("push", short_help="Upload a checkpoint with a model card.")
@click.argument("network", metavar=NETWORK)
@click.argument("repo", metavar="USER/REPO")
@license_option(help="License of the checkpoint, if it does not state one.")
@click.option(
    "--accept-license", is_flag=True, help="Confirm that the license, which is printed, allows publishing."
)
@click.option("--public", is_flag=True, help="Visible to everyone; the default is private.")
@click.option(
    "--which", type=click.Choice(WHICH), default="all", show_default=True, help="Networks to upload."
)
def push_command(
    network: str, repo: str, license: str | None, accept_license: bool, public: bool, which: str
) -> None:
    """Upload a checkpoint as safetensors, with sample images and a model card.

    The card has license, data, metrics of the run, usage and the origin of the weights. Log in with
    `hf auth login`, or set $HF_TOKEN.
    """
    from finetune.export.publish import check_license, push
    from finetune.resolve import load

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"{repo}: not a repository. Use USER/REPO.")
    path = network_file(network)
    checkpoint = with_license(load(path), license)
    click.echo(f"License: {check_license(checkpoint)}")
    if not accept_license:
        raise ConfigError(
            "The license is not confirmed, so nothing was uploaded. If it allows that, use --accept-license."
        )
    metrics = metrics_of(path.parent, checkpoint.provenance.nimg)
    with progress_bar("comparing images", 1) as progress:
        url = push(checkpoint, repo, public=public, which=which, metrics=metrics, progress=progress)
    click.echo(f"Published {path.name} ({'public' if public else 'private'}): {url}")


def metrics_of(run_dir: Path, nimg: int | None) -> dict[str, Any] | None:
    """Return what a run measured after `nimg` images, None if it measured nothing or is no run."""
    from finetune.report.read import read_lines

    lines = [line for line in read_lines(run_dir / "log.jsonl") if line.get("nimg") == nimg]
    return next((line["metrics"] for line in reversed(lines) if line.get("metrics")), None)
