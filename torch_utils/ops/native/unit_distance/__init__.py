"""Kernels of unit_distance."""
