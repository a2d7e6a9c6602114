// upfirdn2d on CUDA. A thread computes a small block of neighboring outputs in registers: each input value
// is read once and added to all outputs that it contributes to.
//
// The mapping of inputs and taps to outputs is a compile-time constant, since every block starts with the
// same phase. Planar images (and those of any strides) are staged in shared memory, where each value is
// converted once and the border is zero; channels-last images are read directly, some channels per thread.
//
// Macros: SG_DTYPE, SG_SEPARABLE (0, 1), SG_CHANNELS_LAST (0, 1), SG_UP_X, SG_UP_Y, SG_DOWN_X, SG_DOWN_Y,
// SG_TAPS_X, SG_TAPS_Y, SG_PHASE_X, SG_PHASE_Y (the tap of the first input of a block), SG_COLUMNS,
// SG_ROWS (outputs per thread), SG_LANES (adjacent threads: along x, or along the channels), SG_THREADS,
// SG_SHARED_BYTES (reserved by the plan), SG_UNROLL (0: filters too large to unroll), SG_INDEX_64.
// Planar: SG_LOAD (elements per load: 1 or as many as fit into 16 bytes of accs), SG_SHIFT (of the first
// input in them), SG_STORE (elements per store), SG_DENSE (1: rows have no gaps). Channels-last:
// SG_VECTOR (channels per thread), SG_FACTORS (1: the kernel tests whether the 2-D filter is separable).
#include "upfirdn2d.h"
#include "../cuda.cuh"

#if SG_UNROLL
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("unroll 1")
#endif

// Number of inputs that a thread's outputs need, and the distance between the first inputs of adjacent threads.
#define NEEDS_X ((SG_TAPS_X - 1 - SG_PHASE_X + (SG_COLUMNS - 1) * SG_DOWN_X) / SG_UP_X + 1)
#define NEEDS_Y ((SG_TAPS_Y - 1 - SG_PHASE_Y + (SG_ROWS - 1) * SG_DOWN_Y) / SG_UP_Y + 1)
#define ADVANCE_X (SG_COLUMNS * SG_DOWN_X / SG_UP_X)
#define ADVANCE_Y (SG_ROWS * SG_DOWN_Y / SG_UP_Y)
static_assert(ADVANCE_X * SG_UP_X == SG_COLUMNS * SG_DOWN_X && ADVANCE_Y * SG_UP_Y == SG_ROWS * SG_DOWN_Y, "phase");

#define KEEPS_TAPS (SG_UNROLL && TAPS <= 32)  // in registers
#define TAPS (SG_SEPARABLE ? SG_TAPS_X + SG_TAPS_Y : SG_TAPS_X * SG_TAPS_Y)

// The tap between an input and an output, both relative to a thread's first; it may be out of range.
__device__ __forceinline__ constexpr int tap_x(int input, int output) {
    return SG_PHASE_X + input * SG_UP_X - output * SG_DOWN_X;
}
__device__ __forceinline__ constexpr int tap_y(int input, int output) {
    return SG_PHASE_Y + input * SG_UP_Y - output * SG_DOWN_Y;
}

// The last input that an output needs, 0 if it needs none.
__device__ __forceinline__ constexpr int last_y(int output) {
    const int last = output * SG_DOWN_Y + SG_TAPS_Y - 1;
    return last < SG_PHASE_Y ? 0 : (last - SG_PHASE_Y) / SG_UP_Y;
}

// The first input of a block that begins with that output.
__device__ __forceinline__ int first_x(int output, int pad) {
    return (output * SG_DOWN_X - pad + SG_PHASE_X) / SG_UP_X;
}
__device__ __forceinline__ int first_y(int output, int pad) {
    return (output * SG_DOWN_Y - pad + SG_PHASE_Y) / SG_UP_Y;
}

// Tap k in correlation order, with the gain; for separable filters first those along x, then those along y, with
// the gain.
__device__ __forceinline__ acc read_tap(const sg_upfirdn2d_params& p, int k) {
    const int size = SG_SEPARABLE ? SG_TAPS_X : TAPS, i = k < size ? k : k - size;
    const acc tap = static_cast<const acc*>(p.f)[p.flip_filter ? i : size - 1 - i];
    return SG_SEPARABLE && k < size ? tap : tap * static_cast<acc>(p.gain);
}

// Prefetch each thread's first tap.
__device__ __forceinline__ acc first_tap(const sg_upfirdn2d_params& p) {
    return threadIdx.x < TAPS ? read_tap(p, threadIdx.x) : acc(0);
}
__device__ __forceinline__ void keep_taps(const sg_upfirdn2d_params& p, acc first, acc* taps) {
    if (threadIdx.x < TAPS) taps[threadIdx.x] = first;
#if TAPS > SG_THREADS
    for (int k = threadIdx.x + SG_THREADS; k < TAPS; k += SG_THREADS) taps[k] = read_tap(p, k);
#endif
}

#if SG_CHANNELS_LAST
#include "channels_last.cuh"
#else
#include "planar.cuh"
#endif
