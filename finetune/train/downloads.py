"""What a run would download, for `--dry-run`; a server is asked for no more than the size of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config import TrainOptions
from finetune.hub import catalog, store
from finetune.hub.download import stated_size
from finetune.metrics import inception
from finetune.metrics.evaluate import METRICS, PPL_BACKBONES
from finetune.metrics.perceptual import WEIGHTS, WEIGHTS_MB, weights_path
from finetune.resolve import as_url
from finetune.train.validation import names_of


@dataclass(frozen=True)
class Needed:
    """A file that is not on this machine: its name, its size in words, and whether it is the checkpoint."""

    name: str
    size: str
    is_checkpoint: bool = False

    def __str__(self) -> str:
        return f"Would download: {self.name}, {self.size}."


def needed_downloads(options: TrainOptions) -> list[Needed]:
    """Return the files that a run with valid options would download first."""
    wanted = options.with_defaults()
    return [*_checkpoint(str(wanted.resume)), *_weights(wanted)]


def _checkpoint(resume: str) -> Iterator[Needed]:
    if url := as_url(resume):
        if not store.is_kept(store.place_of_url(url)):
            yield Needed(f"checkpoint {url}", _size(None, [url]), True)
    elif resume and not Path(resume).expanduser().exists() and (entry := catalog.find(resume)):
        if not store.is_kept(store.place_of(entry)):
            yield Needed(f"checkpoint {entry.id}", _size(entry.size, entry.urls), True)


def _weights(options: TrainOptions) -> Iterator[Needed]:
    metrics = names_of(options)
    of_metrics = [PPL_BACKBONES[name] for name in metrics if name in PPL_BACKBONES]
    backbones = {str(options.sd_backbone), *of_metrics}
    for name in sorted(backbones):
        if name in WEIGHTS and not weights_path(name).is_file():
            yield Needed(f"weights of {name}", f"{WEIGHTS_MB[name]} MB")
    entry = catalog.get(inception.WEIGHTS)
    if any(METRICS[name][0] == "inception" for name in metrics) and not store.is_kept(store.place_of(entry)):
        yield Needed("weights of Inception", _size(entry.size, entry.urls))


def _size(known: int | None, urls: Sequence[str]) -> str:
    size = known or stated_size(urls)
    return f"{size / 1e6:.0f} MB" if size else "of a size that is not known here"
