"""A small checkpoint, two small image sets, and the main job on them."""

KIMG = 3.0  # a few minutes of training on two CPU cores
