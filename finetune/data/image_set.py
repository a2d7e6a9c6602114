"""The images of a folder or zip as a torch data set."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.data.decode import decode, height_and_width
from finetune.data.labels import read_labels
from finetune.data.problems import Problem, Unusable, escaped, hint, refusal
from finetune.data.sources import open_source
from finetune.data.workers import in_order
from finetune.errors import DataError
from finetune.options import CHANNELS, FITS

MAX_NAME = 64  # bytes; run folders are named after the set
CACHE_BYTES = 256 << 20  # decoded; sets that take no more are read into memory once
READ_AT_ONCE = 64  # images that a worker hands over together


class ImageSet(Dataset):
    """Items `(uint8 [channels, height, width], float32 [num_classes])` in the order of sorted names.

    `resolution` is the side of square images, or (height, width). `labels_from`: `file` or `folders`.
    `num_classes` is 0 if labels are not used, else that of the network (given) or of the labels.
    With `mirror` items n to 2n-1 are items 0 to n-1 flipped left-right. Raises DataError: on opening if
    images or labels are missing, on reading if an image is unusable (`scan` finds all of those beforehand).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resolution: int | tuple[int, int],
        channels: int,
        fit: str | None = None,
        use_labels: bool = False,
        labels_from: str = "file",
        num_classes: int | None = None,
        mirror: bool = False,
    ) -> None:
        check_channels(channels)
        if fit is not None and fit not in FITS:
            raise ValueError(f"fit={fit!r} is none of {', '.join(FITS)}")
        self.size = height_and_width(resolution)
        self.resolution = max(self.size)
        self.channels, self.fit, self.mirror = channels, fit, mirror
        self.source = open_source(path)
        self.path = self.source.path
        real = self.path.resolve()
        name = real.stem if self.path.is_file() else real.name
        self.name = name.encode("utf-8", "replace")[:MAX_NAME].decode("utf-8", "ignore")
        self.names = self.source.names
        self._labels = None
        if use_labels:
            self._labels, problems = read_labels(self.source, self.names, num_classes, labels_from)
            if problems:
                raise refusal(self.path, len(self.names), problems)
        self._pixels: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        return 0 if self._labels is None else self._labels.num_classes

    @property
    def label_kind(self) -> str | None:
        """Return 'classes' or 'vectors', None without labels. Vectors that are all one-hot are classes."""
        return None if self._labels is None else self._labels.kind

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that the images have, in order; empty if they are not known."""
        return () if self._labels is None else self._labels.class_names

    def __len__(self) -> int:
        return len(self.names) * (2 if self.mirror else 1)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        flip, image = divmod(index % len(self), len(self.names))
        pixels = self._read(image) if self._pixels is None else self._pixels[image]
        return (pixels[:, :, ::-1] if flip else pixels).copy(), self._label_of(image)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # a copy in another process reads the files itself

    def random_labels(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw labels of `n` images with replacement, float32 `[n, num_classes]`."""
        if self._labels is None:
            return torch.zeros(n, 0)
        picked = torch.randint(len(self.names), (n,), generator=generator)
        return torch.from_numpy(self._labels.one_hot(picked.numpy()))

    def preload(self, max_bytes: int = CACHE_BYTES, *, workers: int = 0) -> bool:
        """Decode everything into memory once if that takes at most `max_bytes`; return whether it did."""
        num_bytes = len(self.names) * self.channels * math.prod(self.size)
        if self._pixels is None and num_bytes <= max_bytes:
            pixels = np.empty((len(self.names), self.channels, *self.size), np.uint8)
            parts = torch.arange(len(self.names)).split(READ_AT_ONCE)
            for part, images in zip(parts, self.batches(parts, workers=workers), strict=True):
                pixels[part.numpy()] = images.numpy()
            self._pixels = pixels
        return self._pixels is not None

    def batches(self, parts: Sequence[torch.Tensor], *, workers: int = 0) -> Iterator[torch.Tensor]:
        """Yield the images of each part (indices of items), uint8 `[N, channels, height, width]`.

        Raises DataError for an image that cannot be used.
        """
        num_images = sum(len(part) for part in parts)
        for images in in_order(_Batches(self, parts), len(parts), workers, num_images=num_images):
            if isinstance(images, DataError):
                raise images
            yield images

    @functools.cached_property
    def listing_hash(self) -> str:
        """SHA-256 of the names, sizes in bytes and labels of all images, as they are when it is first needed.

        Reads none of them. Equal for a folder and a zip of it.
        """
        listing = [(name, self.source.stamp(name)[0]) for name in self.names]
        digest = hashlib.sha256(repr((listing, self.num_classes)).encode("utf-8", "backslashreplace"))
        digest.update(b"" if self._labels is None else self._labels.values.tobytes())
        return digest.hexdigest()

    def content_hash(self) -> str:
        """Return SHA-256 of all that decides the items: files, their names, labels, channels, fit and so on.

        Equal for a folder and a zip of it. Reads a folder's files completely, a zip's directory only
        (CRC-32).
        """
        digest = hashlib.sha256()
        size = self.resolution if self.size[0] == self.size[1] else self.size
        digest.update(repr((size, self.channels, self.fit, self.mirror, self.num_classes)).encode())
        for index, name in enumerate(self.names):
            try:
                digest.update(repr((name, *self.source.checksum(name))).encode("utf-8", "backslashreplace"))
            except Unusable as problem:
                raise self._refusal(name, problem) from None
            digest.update(self._label_of(index).tobytes())
        return digest.hexdigest()

    def _label_of(self, image: int) -> np.ndarray:
        return np.zeros(0, np.float32) if self._labels is None else self._labels.one_hot(image)

    def _read(self, image: int) -> np.ndarray:
        name = self.names[image]
        try:
            data = self.source.read(name)
            return decode(data, resolution=self.size, channels=self.channels, fit=self.fit)
        except Unusable as problem:
            raise self._refusal(name, problem) from None

    def _refusal(self, name: str, problem: Unusable) -> DataError:
        return DataError(
            f"{self.path}: {escaped(name)} {problem.kind}: {problem.detail}.",
            hint=hint([Problem(name, problem.kind, problem.detail)], self.path),
        )


def check_channels(channels: int) -> None:
    """Raise DataError unless images can be converted to this number of channels."""
    if channels not in CHANNELS:
        known = "1 (gray), 3 (color) and 4 (color with alpha)"
        raise DataError(f"The network has {channels} image channels, which is not supported ({known} are).")


class _Batches(Dataset):
    """The images of each part; a problem is an item too, because torch rewords what workers raise."""

    def __init__(self, image_set: ImageSet, parts: Sequence[torch.Tensor]) -> None:
        self.image_set, self.parts = image_set, parts

    def __getitem__(self, index: int) -> torch.Tensor | DataError:
        try:
            images = [self.image_set[item][0] for item in self.parts[index].tolist()]
        except DataError as error:
            return error
        return torch.from_numpy(np.stack(images))
