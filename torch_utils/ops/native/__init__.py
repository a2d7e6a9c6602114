"""Kernels of the ops in C++ and CUDA, free of torch headers, and what builds, calls and registers them."""
