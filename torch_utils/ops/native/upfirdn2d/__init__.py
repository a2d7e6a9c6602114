"""Kernels of upfirdn2d."""
