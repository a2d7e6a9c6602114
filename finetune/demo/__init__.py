"""A small checkpoint and two small data sets, and two fine-tuning runs with them."""

KIMG = 2.0  # of each run: a minute of training on two CPU cores
