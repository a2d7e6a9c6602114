"""Read the images of a run, compare them with the checkpoint, and collect what defaults follow from."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from finetune.checkpoint.load import Checkpoint
from finetune.data import ImageSet, scan
from finetune.data.labels import differing_names
from finetune.distributed import ProcessGroup
from finetune.errors import ConfigError, DataError
from finetune.metrics import features
from finetune.models import image_size
from finetune.options import TrainOptions
from finetune.recipes import RunFacts
from finetune.resolve import published_for


def read_data(
    options: TrainOptions,
    checkpoint: Checkpoint | None,
    device: torch.device,
    on_message: Callable[[str], None],
    group: ProcessGroup,
) -> tuple[ImageSet, RunFacts, list[str], dict[str, str]]:
    """Scan the data and compare it with the network; return image set, facts of the run, notes, overview."""
    networks = facts_of_networks(options, checkpoint)
    channels, base_shape = networks["channels"], networks["base_shape"]
    use_labels, num_classes = labels_wanted(options, checkpoint)
    asked: dict[str, Any] = dict(
        resolution=tuple(side * networks["resolution"] // 4 for side in base_shape),
        fit=options.fit,
        use_labels=use_labels,
        labels_from=str(options.labels),
        num_classes=num_classes,
    )
    notes: list[str] = []
    overview: dict[str, str] = {}
    if group.is_first:
        with suggest_label_options(num_classes):
            found = scan(
                str(options.data),
                **asked,
                workers=options.workers,
                progress=lambda done, total: on_message(f"Reading images: {done} of {total}"),
            )
            found.raise_for_problems()
        notes, overview = [*found.notes, *found.against(channels)], found.overview()
        if checkpoint is not None and options.cond is None and not use_labels and found.has_labels:
            notes.append(
                "The labels of the images are not used, since the checkpoint has no classes. --cond adds "
                "classes to it."
            )
    group.barrier("the scan of the data")
    mirror = bool(options.mirror)
    image_set = ImageSet(str(options.data), **asked, channels=channels, mirror=mirror)
    if checkpoint is not None:
        notes += compare_labels(checkpoint, image_set, options.classes)
    facts = RunFacts(
        **networks,
        c_dim=image_set.num_classes if use_labels else 0,
        num_images=len(image_set) // (2 if mirror else 1),
        device_type=device.type,
        cpu_count=os.cpu_count() or 1,
        from_scratch=bool(options.scratch),
        gpu_memory_gib=gpu_memory_gib(device),
        num_processes=group.world_size,
        has_effnet=has_effnet(),
    )
    return image_set, facts, notes, overview


def facts_of_networks(options: TrainOptions, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return those fields of RunFacts that follow from the checkpoint, or with `--scratch` from options."""
    if checkpoint is None:
        return {
            "family": options.scratch,
            "resolution": options.resolution,
            "channels": options.channels or 3,
            "base_shape": (4, 4),
        }
    G = checkpoint.generator
    facts = {
        "family": checkpoint.family,
        "resolution": options.resolution or G.img_resolution,
        "channels": options.channels or G.img_channels,
        "base_shape": image_size(G, 4),
    }
    if checkpoint.D is not None and not options.new_d:
        mbstd = checkpoint.D.b4.mbstd
        facts["group_size"] = 1 if mbstd is None else mbstd.group_size or 1
    facts["converts_d"] = (facts["resolution"], facts["channels"]) != (G.img_resolution, G.img_channels)
    if facts["resolution"] == G.img_resolution:  # published settings are those of a resolution
        facts["published"] = published_for(checkpoint.provenance)
    return facts


def labels_wanted(options: TrainOptions, checkpoint: Checkpoint | None) -> tuple[bool, int | None]:
    """Return whether labels are used, and the number of classes that the images must have (None: any)."""
    cond = True if options.labels == "folders" else options.cond
    if checkpoint is None:
        return bool(cond), None
    c_dim = checkpoint.generator.c_dim
    use_labels = c_dim > 0 if cond is None else cond
    if options.classes and not use_labels:
        raise ConfigError(
            f"--classes {options.classes}: the checkpoint has no classes. Use --cond to add those of the "
            "images."
        )
    # With --classes or new labels, the data set determines the number of classes.
    return use_labels, c_dim if use_labels and not options.classes and c_dim else None


def compare_labels(checkpoint: Checkpoint, image_set: ImageSet, classes: str | None) -> list[str]:
    """Return a note if `--classes` has no effect.

    Without it, raises ConfigError for label vectors instead of classes, and for a class with another name.
    """
    others = differing_names(checkpoint.class_names, image_set.class_names)
    if classes:
        same_number = image_set.num_classes == checkpoint.network.c_dim
        is_idle = classes != "fresh" and same_number and not others
        return [f"--classes {classes} has no effect: the checkpoint has as many classes."] if is_idle else []
    kinds = {"classes": "classes", "vectors": "vectors of numbers"}
    before, now = checkpoint.label_kind, image_set.label_kind
    if before and now and before != now:
        raise ConfigError(
            f"{image_set.path}: its labels are {kinds[now]}, those of the checkpoint {kinds[before]}.",
            hint="To drop those of the checkpoint: --classes fresh.",
        )
    if others:
        raise ConfigError(
            f"{image_set.path}: {others}.",
            hint="If the classes are the same, give them the names of the checkpoint. If not: --classes keep "
            "keeps the embeddings of classes with equal names and initializes the others to their average; "
            "--classes fresh draws all at random.",
        )
    return []


@contextlib.contextmanager
def suggest_label_options(num_classes: int | None) -> Iterator[None]:
    """Add to an error about labels which options change the classes of the checkpoint."""
    try:
        yield
    except DataError as error:
        if num_classes and "label" in error.what:
            hint = (
                f"The checkpoint has {num_classes} classes. To give it those of the images: --classes keep "
                "(or extend, or fresh); to drop its classes: --no-cond."
            )
            error.hint = f"{error.hint}\n{hint}" if error.hint else hint
        raise


def has_effnet() -> bool:
    """Return whether the weights of EfficientNet-Lite0 are installed."""
    return importlib.util.find_spec(features.WEIGHTS_PACKAGE) is not None


def gpu_memory_gib(device: torch.device) -> float | None:
    """Return the memory of a CUDA device in GiB, None for others."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 2**30
