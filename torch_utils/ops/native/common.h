// What the C++ and the CUDA side of every op share. Plain C, no headers: g++, clang, nvcc and NVRTC all read it.
#ifndef SG_COMMON_H
#define SG_COMMON_H

// Element types, by number because Python passes them.
#define SG_F32 0
#define SG_F64 1
#define SG_F16 2
#define SG_BF16 3

// What the C functions return.
#define SG_OK 0
#define SG_UNSUPPORTED 1  // this type or form is not compiled in; the caller takes another implementation
#define SG_NO_MEMORY 2

typedef long long sg_int64;

#endif
