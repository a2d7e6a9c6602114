"""Kernels of filtered_lrelu."""
