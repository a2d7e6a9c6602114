"""Scan one image before training: size, mode, range of values, digest of its pixels."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from finetune.data.decode import highest_deep_value, num_frames, open_image, to_channels, unusual
from finetune.data.problems import Unusable
from finetune.data.sources import Source

BLACK, UNIFORM = "black", "uniform"
ALMOST_ALL = 0.995  # of the pixels
BLACK_BELOW = 16  # of 255
UNIFORM_WITHIN = 8  # of 255, in each channel


class ImageInfo(NamedTuple):
    """Facts about one image.

    `peak`: the highest value if it has 16 bits a channel. `tone`: BLACK, UNIFORM or None.
    """

    width: int
    height: int
    mode: str
    unusual: str | None
    num_frames: int
    digest: bytes
    peak: int | None
    tone: str | None


def inspect_image(data: bytes) -> ImageInfo:
    """Decode an image and return the facts about it. Raises Unusable."""
    image = open_image(data)
    # Of the pixels, so that the same image in another file format is found as well.
    digest = hashlib.blake2b(repr((image.size, image.mode)).encode(), digest_size=16)
    digest.update((image.convert("RGBA") if image.mode in ("P", "PA") else image).tobytes())
    return ImageInfo(
        width=image.width,
        height=image.height,
        mode=image.mode,
        unusual=unusual(image),
        num_frames=num_frames(data),
        digest=digest.digest(),
        peak=highest_deep_value(image),
        tone=tone_of(image),
    )


def tone_of(image: Image.Image) -> str | None:
    """Return BLACK or UNIFORM if almost all pixels are; stray pixels or a date stamp do not matter."""
    histogram = np.reshape(to_channels(image, 3).histogram(), (3, 256))
    reached = np.cumsum(histogram, axis=1) / histogram[0].sum()
    low = (reached < 1 - ALMOST_ALL).sum(axis=1)
    high = (reached < ALMOST_ALL).sum(axis=1)
    if high.max() < BLACK_BELOW:
        return BLACK
    return UNIFORM if (high - low).max() < UNIFORM_WITHIN else None


class InspectedImages(Dataset):
    """Item i is the ImageInfo of image i, or the reason why it cannot be used."""

    def __init__(self, source: Source, names: list[str]) -> None:
        self.source, self.names = source, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageInfo | Unusable:
        try:
            return inspect_image(self.source.read(self.names[index]))
        except Unusable as problem:
            return problem
