"""C++ and CUDA kernels of the ops, free of torch headers, and code to build, call and register them."""
