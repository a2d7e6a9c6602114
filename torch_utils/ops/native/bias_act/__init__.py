"""Kernels of bias_act."""
