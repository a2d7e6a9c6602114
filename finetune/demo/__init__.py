"""A small checkpoint and two small data sets, and a fine-tuning run with them."""

KIMG = 3.0  # a few minutes of training on two CPU cores
