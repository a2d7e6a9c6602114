"""The few names that pickles of the StyleGAN family expect to find under `dnnlib`."""

from . import util
from .util import EasyDict

__all__ = ["EasyDict", "util"]
