// Shared by the CUDA kernels: element types without CUDA headers, and support for emulation on a CPU in the tests.
//
// A kernel is compiled for one specialization, chosen by macros (see the plan.py beside it). SG_DTYPE is the
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
typedef unsigned long long unsigned_t;
#else
typedef int offset_t;
typedef unsigned unsigned_t;
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

// a * b + c, rounded once. (The emulator rounds twice: without instructions for it, a CPU takes a hundred times
// longer.)
__device__ __forceinline__ acc mul_add(acc a, acc b, acc c) {
#ifdef SG_EMULATED
    return a * b + c;
#elif SG_DTYPE == SG_F64
    return __fma_rn(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

#if SG_DTYPE == SG_F16 || SG_DTYPE == SG_BF16
// Two neighbors, the first in the low bits.
__device__ __forceinline__ void unpack_pair(unsigned pair, acc* to) {
#if SG_DTYPE == SG_F16 && !defined(SG_EMULATED)
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
        : "=f"(to[0]), "=f"(to[1])
        : "r"(pair));
#else
    scalar low, high;
    low.bits = static_cast<unsigned short>(pair), high.bits = static_cast<unsigned short>(pair >> 16);
    to[0] = to_acc(low), to[1] = to_acc(high);
#endif
}

__device__ __forceinline__ unsigned pack_pair(acc first, acc second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned pair;
#if SG_DTYPE == SG_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
    return pair;
#else
    return from_acc<scalar>(first).bits | static_cast<unsigned>(from_acc<scalar>(second).bits) << 16;
#endif
}
#endif

__device__ __forceinline__ acc load_acc(const scalar* p) { return to_acc(*p); }
__device__ __forceinline__ void store_acc(scalar* p, acc v) { *p = from_acc<scalar>(v); }

// Adjacent elements, loaded and stored at once; the address must be a multiple of their size.
template <class T, int N>
struct __align__(N * sizeof(T)) vec {
    T v[N];
};

// Adjacent elements of an image as stored. Two 16-bit elements share a register, from which one instruction each
// extracts them; 16-bit variables would first be moved to separate registers.
template <int N>
struct __align__(N * sizeof(scalar)) elements {
#if SG_DTYPE == SG_F16 || SG_DTYPE == SG_BF16
    unsigned pairs[N / 2];

    __device__ __forceinline__ void unpack(acc* to) const {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) unpack_pair(pairs[i], to + 2 * i);
    }
    __device__ __forceinline__ void pack(const acc* from) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) pairs[i] = pack_pair(from[2 * i], from[2 * i + 1]);
    }
#else
    scalar v[N];

    __device__ __forceinline__ void unpack(acc* to) const {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = v[i];
    }
    __device__ __forceinline__ void pack(const acc* from) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = from[i];
    }
#endif
};

template <>
struct __align__(sizeof(scalar)) elements<1> {
    scalar v;

    __device__ __forceinline__ void unpack(acc* to) const { *to = to_acc(v); }
    __device__ __forceinline__ void pack(const acc* from) { v = from_acc<scalar>(*from); }
};

template <int N>
__device__ __forceinline__ elements<N> read(const scalar* from) {
    return *reinterpret_cast<const elements<N>*>(from);
}

// The same if `exists`, else zeros. One predicated instruction: a branch around each of many loads costs more.
template <int N>
__device__ __forceinline__ elements<N> read_if(bool exists, const scalar* from) {
    elements<N> found = {};
#if defined(__CUDA_ARCH__)
    constexpr int bytes = N * sizeof(scalar);
    unsigned words[4] = {};
    unsigned short half = 0;
    const int flag = exists;
    if constexpr (bytes == 2)
        asm("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}" : "+h"(half) : "l"(from), "r"(flag));
    if constexpr (bytes == 4)
        asm("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
            : "+r"(words[0])
            : "l"(from), "r"(flag));
    if constexpr (bytes == 8)
        asm("{.reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
            : "+r"(words[0]), "+r"(words[1])
            : "l"(from), "r"(flag));
    if constexpr (bytes == 16)
        asm("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
            : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
            : "l"(from), "r"(flag));
    if (bytes == 2) memcpy(&found, &half, sizeof found);
    else memcpy(&found, words, sizeof found);
#else
    if (exists) found = read<N>(from);
#endif
    return found;
}

template <int N>
__device__ __forceinline__ void write(scalar* to, const acc* values) {
    elements<N> packed;
    packed.pack(values);
    *reinterpret_cast<elements<N>*>(to) = packed;
}

// Load N accs from shared memory, AT_ONCE per load.
template <int N, int AT_ONCE>
__device__ __forceinline__ void read_shared(const acc* from, acc* to) {
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
        const vec<acc, AT_ONCE> part = *reinterpret_cast<const vec<acc, AT_ONCE>*>(from + i);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) to[i + k] = part.v[k];
    }
}

#define QUAD (16 / static_cast<int>(sizeof(acc)))  // accs per load from shared memory
#define UP_TO(multiple, n) (((n) + (multiple) - 1) / (multiple) * (multiple))
// accs per load for threads with this distance
#define WIDEST(step) ((step) % QUAD == 0 ? QUAD : (step) % 2 == 0 ? 2 : 1)

__device__ __forceinline__ constexpr bool in_range(int i, int size) {
    return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// Limit the magnitude; NaN stays NaN.
__device__ __forceinline__ acc clamp_to(acc v, acc limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && SG_DTYPE != SG_F64
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(-limit));
    return v;
#else
    v = v > limit ? limit : v;
    return v < -limit ? -limit : v;
#endif
}

// Return the sum over a group of `width` lanes, a power of two up to 32, in each lane; called by all threads of a warp.
__device__ __forceinline__ acc sum_of_lanes(acc v, int width) {
    for (int mask = width / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}

__device__ __forceinline__ int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
#endif
