"""The networks. Each file here is also the source that checkpoints carry: see README.md for the rules."""

from typing import Any

Network = Any  # a torch.nn.Module of this package, whose attributes type checkers cannot see


def image_size(network: Network, resolution: int | None = None) -> tuple[int, int]:
    """Return (height, width) of the images of a generator or discriminator, or at another `resolution`.

    StyleGAN3's generators are square, StyleGAN2's networks have the shape of their constant.
    """
    height, width = getattr(network, "base_shape", (4, 4))
    scale = (resolution or network.img_resolution) // 4
    return height * scale, width * scale
