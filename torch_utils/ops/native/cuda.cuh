// What the CUDA kernels share: element types without CUDA's headers, and a way to run on a CPU for the tests.
//
// A kernel is compiled for one specialisation, chosen by macros (see the plan.py beside it). SG_DTYPE is the
// type of images; everything is computed in acc: float, double for double. With SG_INDEX_64 offsets in
// elements have 64 bits.
#ifndef SG_CUDA_CUH
#define SG_CUDA_CUH
#include "common.h"

#ifdef SG_EMULATED
#include "emulator.h"
#else
#define SG_SHARED_MEMORY extern __shared__ __align__(16) unsigned char sg_shared_memory[]
#endif

struct sg_f16 {
    unsigned short bits;
};
struct sg_bf16 {
    unsigned short bits;
};

#if SG_DTYPE == SG_F32
typedef float scalar;
typedef float acc;
#elif SG_DTYPE == SG_F64
typedef double scalar;
typedef double acc;
#elif SG_DTYPE == SG_F16
typedef sg_f16 scalar;
typedef float acc;
#else
typedef sg_bf16 scalar;
typedef float acc;
#endif

#ifdef SG_INDEX_64
typedef long long offset_t;
#else
typedef int offset_t;
#endif

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }

__device__ __forceinline__ float to_acc(sg_f16 v) {
#ifdef SG_EMULATED
    return sg_emulator::half_to_float(v.bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#endif
}

__device__ __forceinline__ float to_acc(sg_bf16 v) {
#ifdef SG_EMULATED
    return sg_emulator::float_of(static_cast<unsigned>(v.bits) << 16);
#else
    return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
#endif
}

template <class S>
__device__ __forceinline__ S from_acc(acc v);

template <>
__device__ __forceinline__ float from_acc<float>(acc v) { return static_cast<float>(v); }

template <>
__device__ __forceinline__ double from_acc<double>(acc v) { return static_cast<double>(v); }

template <>
__device__ __forceinline__ sg_f16 from_acc<sg_f16>(acc v) {
    sg_f16 h;
#ifdef SG_EMULATED
    h.bits = sg_emulator::float_to_half(static_cast<float>(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(static_cast<float>(v)));
#endif
    return h;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
__device__ __forceinline__ sg_bf16 from_acc<sg_bf16>(acc v) {
    sg_bf16 b;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(static_cast<float>(v)));
#else
#ifdef SG_EMULATED
    const unsigned bits = sg_emulator::bits_of(static_cast<float>(v));
#else
    const unsigned bits = __float_as_uint(static_cast<float>(v));
#endif
    if ((bits & 0x7fffffffu) > 0x7f800000u) b.bits = 0x7fc0;
    else b.bits = static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return b;
}

// a * b + c, rounded once. (The emulator rounds twice: without instructions for it, a CPU takes a hundred times longer.)
__device__ __forceinline__ acc mul_add(acc a, acc b, acc c) {
#ifdef SG_EMULATED
    return a * b + c;
#elif SG_DTYPE == SG_F64
    return __fma_rn(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

__device__ __forceinline__ acc load_acc(const scalar* p) { return to_acc(*p); }
__device__ __forceinline__ void store_acc(scalar* p, acc v) { *p = from_acc<scalar>(v); }

// Neighbours, read and written at once; the address has to be a multiple of their size.
template <class S, int N>
struct __align__(N * sizeof(S)) several {
    S v[N];
};

__device__ __forceinline__ int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
#endif
