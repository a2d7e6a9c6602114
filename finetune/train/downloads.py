"""Dry runs without downloads: what would be downloaded, and the settings known without it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console

from finetune import recipes
from finetune.config import TrainConfig
from finetune.data import scan
from finetune.data.scanning import counted
from finetune.device import resolve_device
from finetune.errors import CheckpointError
from finetune.hub import catalog, huggingface, identify, store
from finetune.hub.download import stated_size
from finetune.metrics import inception
from finetune.metrics.evaluate import METRICS, PPL_BACKBONES
from finetune.metrics.perceptual import WEIGHTS, WEIGHTS_MB, weights_path
from finetune.options import TrainOptions
from finetune.recipes import Reason, RunFacts
from finetune.resolve import as_url, check_architecture
from finetune.train.facts import gpu_memory_gib, has_effnet
from finetune.train.progress import print_reasons
from finetune.train.validation import names_of


def missing_checkpoint(resume: str) -> str | None:
    """Return what would be downloaded for `--resume`, with its size; None if nothing.

    Raises CheckpointError if it could not be loaded then.
    """
    if address := huggingface.parse(resume):
        try:
            huggingface.find(address)
        except CheckpointError:
            return f"checkpoint {address}"
        return None
    url = as_url(resume)
    entry = catalog.find_url(url) if url else catalog.find(resume)
    if url and entry is None:
        is_here = store.is_kept(store.place_of_url(url))
        return None if is_here else f"checkpoint {url}, {_size(None, [url])}"
    if not url and (not resume or os.path.exists(resume)):
        return None
    if entry is None or store.is_kept(store.place_of(entry)):
        return None
    check_architecture(entry)
    return f"checkpoint {entry.id}, {_size(entry.size, entry.urls)}"


def missing_weights(config: TrainConfig) -> list[str]:
    """Return the weights that a run would download for its backbone and metrics, with their sizes."""
    metrics = names_of(config)
    backbones = {config.sd_backbone, *(PPL_BACKBONES[name] for name in metrics if name in PPL_BACKBONES)}
    needed = [
        f"weights of {name}, {WEIGHTS_MB[name]} MB"
        for name in sorted(backbones)
        if name in WEIGHTS and not weights_path(name).is_file()
    ]
    entry = catalog.get(inception.WEIGHTS)
    if any(METRICS[name][0] == "inception" for name in metrics) and not store.is_kept(store.place_of(entry)):
        needed.append(f"weights of Inception, {_size(entry.size, entry.urls)}")
    return needed


def show_without_checkpoint(asked: TrainOptions, console: Console) -> None:
    """Check options and images, and print the settings that follow from the catalog alone.

    Raises ConfigError and DataError.
    """
    asked.validate()
    url = as_url(str(asked.resume))
    entry = catalog.find_url(url) if url else catalog.find(str(asked.resume))
    resolution = asked.resolution or (entry.resolution if entry else None)
    found = scan(str(asked.data), resolution=resolution, fit=asked.with_defaults().fit)
    found.raise_for_problems()
    console.print(f"{counted(found.num_images, 'image')} from {asked.data}.", highlight=False, markup=False)
    if entry is None or resolution is None:
        return
    device = resolve_device(asked.device or "auto")
    facts = RunFacts(
        family=entry.architecture,
        resolution=resolution,
        channels=asked.channels or 3,
        c_dim=0 if asked.cond is False else entry.classes or 0,
        num_images=found.num_images,
        device_type=device.type,
        cpu_count=os.cpu_count() or 1,
        from_scratch=False,
        gpu_memory_gib=gpu_memory_gib(device),
        published=identify.published(entry) if resolution == entry.resolution else None,
        has_effnet=has_effnet(),
        converts_d=resolution != entry.resolution or asked.channels is not None,
    )
    config, reasons = recipes.resolve(asked, facts)
    if config.recipe == "few-shot" and asked.freezed is None and not (config.new_d or facts.converts_d):
        later = Reason("freezed", "40 %", "of the layers of D, counted when the checkpoint is here")
        reasons = [later if reason.name == "freezed" else reason for reason in reasons]
    print_reasons(console, reasons)
    for each in missing_weights(config):
        console.print(f"Would download: {each}.", highlight=False)
    console.print("The checkpoint itself may change settings.", highlight=False)


def _size(known: int | None, urls: Sequence[str]) -> str:
    size = known or stated_size(urls)
    return f"{size / 1e6:.0f} MB" if size else "of a size that is not known here"
