"""Kernels of fma."""
