"""Labels of the images against those of the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from finetune.checkpoint.load import Checkpoint
from finetune.data import ImageSet
from finetune.errors import ConfigError, DataError


def compare_labels(checkpoint: Checkpoint, image_set: ImageSet, classes: str | None) -> list[str]:
    """Return a note if `--classes` has no effect; raise ConfigError for label vectors instead of classes."""
    if classes:
        is_idle = classes != "fresh" and image_set.num_classes == checkpoint.network.c_dim
        return [f"--classes {classes} has no effect: the checkpoint has as many classes."] * is_idle
    kinds = {"classes": "classes", "vectors": "vectors of numbers"}
    before, now = checkpoint.label_kind, image_set.label_kind
    if before and now and before != now:
        raise ConfigError(
            f"--data {image_set.path}: its labels are {kinds[now]}, those of the checkpoint {kinds[before]}.",
            hint="To drop those of the checkpoint: --classes fresh.",
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
