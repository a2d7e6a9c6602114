// upfirdn2d on CUDA: tiles of one image plane through shared memory, or channels side by side.
//
// Macros: SG_DTYPE, SG_UP_X, SG_UP_Y, SG_DOWN_X, SG_DOWN_Y, SG_TAPS_X, SG_TAPS_Y, SG_SEPARABLE (0, 1),
// SG_CHANNELS_LAST (0, 1), SG_VECTOR (channels of a thread, channels-last only), SG_TILE_W, SG_TILE_H (outputs of a
// block), SG_FIXED_PHASE (0, 1: every output of a thread meets the same taps), SG_INDEX_64.
#include "upfirdn2d.h"
#include "../cuda.cuh"

#define THREADS 256
#define STEPS_X ((SG_TAPS_X + SG_UP_X - 1) / SG_UP_X)
#define STEPS_Y ((SG_TAPS_Y + SG_UP_Y - 1) / SG_UP_Y)
// Taps with zeros behind them, so that every phase has the same number.
#define PADDED_X (STEPS_X * SG_UP_X)
#define PADDED_Y (STEPS_Y * SG_UP_Y)
#define IN_W (((SG_TILE_W - 1) * SG_DOWN_X + SG_TAPS_X - 1) / SG_UP_X + 2)
#define IN_H (((SG_TILE_H - 1) * SG_DOWN_Y + SG_TAPS_Y - 1) / SG_UP_Y + 2)

__device__ __forceinline__ int first_input(int output, int up, int down, int pad) {
    return -floor_div(pad - output * down, up);  // rounded up
}

__device__ __forceinline__ void read_taps(const sg_upfirdn2d_params& p, acc* taps) {
    const acc* const f = static_cast<const acc*>(p.f);
    const acc gain = static_cast<acc>(p.gain);
#if SG_SEPARABLE
    // Along x, then along y with the gain.
    for (int k = threadIdx.x; k < PADDED_X + PADDED_Y; k += THREADS) {
        const bool is_x = k < PADDED_X;
        const int i = is_x ? k : k - PADDED_X;
        acc v = acc(0);
        if (i < SG_TAPS_X) v = f[p.flip_filter ? i : SG_TAPS_X - 1 - i] * (is_x ? acc(1) : gain);
        taps[k] = v;
    }
#else
    for (int k = threadIdx.x; k < PADDED_Y * PADDED_X; k += THREADS) {
        const int ky = k / PADDED_X, kx = k % PADDED_X;
        acc v = acc(0);
        if (ky < SG_TAPS_Y && kx < SG_TAPS_X)
            v = gain * (p.flip_filter ? f[ky * SG_TAPS_X + kx] : f[(SG_TAPS_Y - 1 - ky) * SG_TAPS_X + SG_TAPS_X - 1 - kx]);
        taps[k] = v;
    }
#endif
}

#if SG_CHANNELS_LAST
struct __align__(SG_VECTOR * sizeof(scalar)) channels {
    scalar v[SG_VECTOR];
};

extern "C" __global__ void __launch_bounds__(THREADS) sg_upfirdn2d_cuda(const sg_upfirdn2d_params p) {
    SG_SHARED_MEMORY;
    acc* const taps = reinterpret_cast<acc*>(sg_shared_memory);
    read_taps(p, taps);
    __syncthreads();
    const int groups = p.c / SG_VECTOR;
    const long long total = static_cast<long long>(p.n) * p.out_h * p.out_w * groups;
    for (long long work = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; work < total;
         work += static_cast<long long>(gridDim.x) * THREADS) {
        const int c = static_cast<int>(work % groups) * SG_VECTOR;
        const long long pixel = work / groups;
        const int ox = static_cast<int>(pixel % p.out_w), oy = static_cast<int>(pixel / p.out_w % p.out_h);
        const int n = static_cast<int>(pixel / p.out_w / p.out_h);
        const int ix = first_input(ox, SG_UP_X, SG_DOWN_X, p.pad_x0), iy = first_input(oy, SG_UP_Y, SG_DOWN_Y, p.pad_y0);
        const int kx = ix * SG_UP_X + p.pad_x0 - ox * SG_DOWN_X, ky = iy * SG_UP_Y + p.pad_y0 - oy * SG_DOWN_Y;
        const scalar* const x = static_cast<const scalar*>(p.x) + static_cast<offset_t>(n) * static_cast<offset_t>(p.x_stride[0]) + c;
        acc sum[SG_VECTOR];
#pragma unroll
        for (int v = 0; v < SG_VECTOR; ++v) sum[v] = acc(0);
#pragma unroll
        for (int ty = 0; ty < STEPS_Y; ++ty) {
            if (iy + ty < 0 || iy + ty >= p.in_h) continue;
#pragma unroll
            for (int tx = 0; tx < STEPS_X; ++tx) {
                if (ix + tx < 0 || ix + tx >= p.in_w) continue;
#if SG_SEPARABLE
                const acc tap = taps[kx + tx * SG_UP_X] * taps[PADDED_X + ky + ty * SG_UP_Y];
#else
                const acc tap = taps[(ky + ty * SG_UP_Y) * PADDED_X + kx + tx * SG_UP_X];
#endif
                const channels in = *reinterpret_cast<const channels*>(
                    x + static_cast<offset_t>(iy + ty) * static_cast<offset_t>(p.x_stride[2]) +
                    static_cast<offset_t>(ix + tx) * static_cast<offset_t>(p.x_stride[3]));
#pragma unroll
                for (int v = 0; v < SG_VECTOR; ++v) sum[v] += tap * to_acc(in.v[v]);
            }
        }
        channels out;
#pragma unroll
        for (int v = 0; v < SG_VECTOR; ++v) out.v[v] = from_acc<scalar>(sum[v]);
        *reinterpret_cast<channels*>(static_cast<scalar*>(p.y) + static_cast<offset_t>(n) * static_cast<offset_t>(p.y_stride[0]) +
                                     static_cast<offset_t>(oy) * static_cast<offset_t>(p.y_stride[2]) +
                                     static_cast<offset_t>(ox) * static_cast<offset_t>(p.y_stride[3]) + c) = out;
    }
}
#else
extern "C" __global__ void __launch_bounds__(THREADS) sg_upfirdn2d_cuda(const sg_upfirdn2d_params p) {
    SG_SHARED_MEMORY;
    acc* const taps = reinterpret_cast<acc*>(sg_shared_memory);
    acc* const in = taps + (SG_SEPARABLE ? PADDED_X + PADDED_Y : PADDED_X * PADDED_Y);
#if SG_SEPARABLE
    acc* const rows = in + IN_H * IN_W;  // filtered along x
#endif
    read_taps(p, taps);
    const int tiles_x = (p.out_w + SG_TILE_W - 1) / SG_TILE_W, tiles_y = (p.out_h + SG_TILE_H - 1) / SG_TILE_H;
    const long long total = static_cast<long long>(p.n) * p.c * tiles_x * tiles_y;
    for (long long work = blockIdx.x; work < total; work += gridDim.x) {
        const int ox0 = static_cast<int>(work % tiles_x) * SG_TILE_W;
        const int oy0 = static_cast<int>(work / tiles_x % tiles_y) * SG_TILE_H;
        const long long plane = work / tiles_x / tiles_y;
        const offset_t n = static_cast<offset_t>(plane / p.c), c = static_cast<offset_t>(plane % p.c);
        const scalar* const x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) + c * static_cast<offset_t>(p.x_stride[1]);
        scalar* const y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) + c * static_cast<offset_t>(p.y_stride[1]);
        const int ix0 = first_input(ox0, SG_UP_X, SG_DOWN_X, p.pad_x0), iy0 = first_input(oy0, SG_UP_Y, SG_DOWN_Y, p.pad_y0);
        __syncthreads();  // the tile before is done, and the taps are there
        for (int i = threadIdx.x; i < IN_H * IN_W; i += THREADS) {
            const int ix = ix0 + i % IN_W, iy = iy0 + i / IN_W;
            acc v = acc(0);
            if (ix >= 0 && iy >= 0 && ix < p.in_w && iy < p.in_h)
                v = load_acc(x + static_cast<offset_t>(iy) * static_cast<offset_t>(p.x_stride[2]) + static_cast<offset_t>(ix) * static_cast<offset_t>(p.x_stride[3]));
            in[i] = v;
        }
        __syncthreads();
#if SG_SEPARABLE
        for (int i = threadIdx.x; i < IN_H * SG_TILE_W; i += THREADS) {
            const int ox = ox0 + i % SG_TILE_W, row = i / SG_TILE_W;
            const int ix = first_input(ox, SG_UP_X, SG_DOWN_X, p.pad_x0), k = ix * SG_UP_X + p.pad_x0 - ox * SG_DOWN_X;
            const acc* const from = in + row * IN_W + ix - ix0;
            acc sum = acc(0);
#pragma unroll
            for (int t = 0; t < STEPS_X; ++t) sum += taps[k + t * SG_UP_X] * from[t];
            rows[i] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < SG_TILE_H * SG_TILE_W; i += THREADS) {
            const int ox = ox0 + i % SG_TILE_W, oy = oy0 + i / SG_TILE_W;
            if (ox >= p.out_w || oy >= p.out_h) continue;
            const int iy = first_input(oy, SG_UP_Y, SG_DOWN_Y, p.pad_y0), k = iy * SG_UP_Y + p.pad_y0 - oy * SG_DOWN_Y;
            const acc* const from = rows + (iy - iy0) * SG_TILE_W + i % SG_TILE_W;
            acc sum = acc(0);
#pragma unroll
            for (int t = 0; t < STEPS_Y; ++t) sum += taps[PADDED_X + k + t * SG_UP_Y] * from[t * SG_TILE_W];
            store_acc(y + static_cast<offset_t>(oy) * static_cast<offset_t>(p.y_stride[2]) + static_cast<offset_t>(ox) * static_cast<offset_t>(p.y_stride[3]), sum);
        }
#else
#if SG_FIXED_PHASE
        acc own[STEPS_Y][STEPS_X];
#endif
        for (int i = threadIdx.x; i < SG_TILE_H * SG_TILE_W; i += THREADS) {
            const int ox = ox0 + i % SG_TILE_W, oy = oy0 + i / SG_TILE_W;
            const int ix = first_input(ox, SG_UP_X, SG_DOWN_X, p.pad_x0), iy = first_input(oy, SG_UP_Y, SG_DOWN_Y, p.pad_y0);
            const int kx = ix * SG_UP_X + p.pad_x0 - ox * SG_DOWN_X, ky = iy * SG_UP_Y + p.pad_y0 - oy * SG_DOWN_Y;
#if SG_FIXED_PHASE
            if (i == static_cast<int>(threadIdx.x)) {
#pragma unroll
                for (int ty = 0; ty < STEPS_Y; ++ty)
#pragma unroll
                    for (int tx = 0; tx < STEPS_X; ++tx) own[ty][tx] = taps[(ky + ty * SG_UP_Y) * PADDED_X + kx + tx * SG_UP_X];
            }
#endif
            const acc* const from = in + (iy - iy0) * IN_W + ix - ix0;
            acc sum = acc(0);
#pragma unroll
            for (int ty = 0; ty < STEPS_Y; ++ty)
#pragma unroll
                for (int tx = 0; tx < STEPS_X; ++tx) {
#if SG_FIXED_PHASE
                    sum += own[ty][tx] * from[ty * IN_W + tx];
#else
                    sum += taps[(ky + ty * SG_UP_Y) * PADDED_X + kx + tx * SG_UP_X] * from[ty * IN_W + tx];
#endif
                }
            if (ox < p.out_w && oy < p.out_h)
                store_acc(y + static_cast<offset_t>(oy) * static_cast<offset_t>(p.y_stride[2]) + static_cast<offset_t>(ox) * static_cast<offset_t>(p.y_stride[3]), sum);
        }
#endif
    }
}
#endif
