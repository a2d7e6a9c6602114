// Definitions shared by the C++ and CUDA sources of every op. Plain C without headers, for g++, clang, nvcc and NVRTC.
#ifndef SG_COMMON_H
#define SG_COMMON_H

// Element types, as numbers since Python passes them.
#define SG_F32 0
#define SG_F64 1
#define SG_F16 2
#define SG_BF16 3

// Return values of the C functions.
#define SG_OK 0
#define SG_UNSUPPORTED 1  // type or shape not compiled in; the caller uses another implementation
#define SG_NO_MEMORY 2

typedef long long sg_int64;

#endif
