"""Image data sets: folders, zips, labels, checks before training, infinite batches. Rules: docs/data.md."""

from finetune.data.decode import images_to_float
from finetune.data.image_set import ImageSet
from finetune.data.loader import InfiniteLoader, build_loader
from finetune.data.problems import Problem
from finetune.data.sampler import InfiniteSampler
from finetune.data.scanning import Scan, scan

__all__ = [
    "ImageSet",
    "InfiniteLoader",
    "InfiniteSampler",
    "Problem",
    "Scan",
    "build_loader",
    "images_to_float",
    "scan",
]
