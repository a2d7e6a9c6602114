"""`finetune report`: the page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.cli.options import LocalPath


@click.command("report", short_help="Write the page of a run, or of several runs side by side.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=LocalPath(path_type=Path))
@click.option(
    "--out",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The page to write.  [default: report.html in the run folder; here for several runs]",
)
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page with images over training time, curves, events, data, options and origin of a run.

    \b
    finetune report runs/00000-images-stylegan2-256
    finetune report runs/00000-images-stylegan2-256 runs/00001-images-stylegan2-256 --out compare.html

    The page is one self-contained file for a browser. Training writes and updates it as well.
    """
    from finetune.report import write_report

    page = write_report(runs, out)
    click.echo(
        f"{page}: {page.stat().st_size / 2**20:.1f} MiB. Open it in a browser: {page.resolve().as_uri()}"
    )
