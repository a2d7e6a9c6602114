// filtered_lrelu on CUDA: a tile of outputs of one image plane, its part of the upsampled image in shared memory alone.
//
// Macros: SG_DTYPE, SG_UP, SG_DOWN, SG_TAPS_UX, SG_TAPS_UY, SG_TAPS_DX, SG_TAPS_DY, SG_SEPARABLE_U, SG_SEPARABLE_D,
// SG_MODE, SG_CLAMPS, SG_HAS_BIAS (0, 1), SG_TILE_W, SG_TILE_H (outputs of a block), SG_INDEX_64.
//
// A row of the mask: for each 32 columns a word "passes as it is" and a word "passes times slope", the votes of a warp.
// Tiles begin at multiples of 32 columns of the grid where bits are recorded, so each word has one writer.
#include "filtered_lrelu.h"
#include "../cuda.cuh"

#define THREADS 256
#define STEPS_UX ((SG_TAPS_UX + SG_UP - 1) / SG_UP)
#define STEPS_UY ((SG_TAPS_UY + SG_UP - 1) / SG_UP)
#define PADDED_UX (STEPS_UX * SG_UP)
#define PADDED_UY (STEPS_UY * SG_UP)
#define TAPS_U (SG_SEPARABLE_U ? PADDED_UX + PADDED_UY : PADDED_UX * PADDED_UY)
#define TAPS_D (SG_SEPARABLE_D ? SG_TAPS_DX : SG_TAPS_DX * SG_TAPS_DY)
// The part of the grid that a tile needs, its rows padded to whole warps.
#define GRID_W ((SG_TILE_W - 1) * SG_DOWN + SG_TAPS_DX)
#define GRID_H ((SG_TILE_H - 1) * SG_DOWN + SG_TAPS_DY)
#define GRID_P ((GRID_W + 31) / 32 * 32)
#define IN_W ((GRID_P + SG_TAPS_UX - 2) / SG_UP + 2)
#define IN_H ((GRID_H + SG_TAPS_UY - 2) / SG_UP + 2)

__device__ __forceinline__ int first_input(int m, int pad) { return -floor_div(pad - m, SG_UP); }  // rounded up

__device__ __forceinline__ void read_taps(const sg_filtered_lrelu_params& p, acc* up, acc* down) {
    const acc *const fu = static_cast<const acc*>(p.fu), *const fd = static_cast<const acc*>(p.fd);
    const acc gain = static_cast<acc>(p.up_gain);
    const bool as_given = p.flip_filter != 0;
#if SG_SEPARABLE_U
    // Along x, then along y with the gain.
    for (int k = threadIdx.x; k < TAPS_U; k += THREADS) {
        const bool is_x = k < PADDED_UX;
        const int i = is_x ? k : k - PADDED_UX;
        acc v = acc(0);
        if (i < SG_TAPS_UX) v = fu[as_given ? i : SG_TAPS_UX - 1 - i] * (is_x ? acc(1) : gain);
        up[k] = v;
    }
#else
    for (int k = threadIdx.x; k < TAPS_U; k += THREADS) {
        const int ky = k / PADDED_UX, kx = k % PADDED_UX;
        acc v = acc(0);
        if (ky < SG_TAPS_UY && kx < SG_TAPS_UX)
            v = gain * (as_given ? fu[ky * SG_TAPS_UX + kx] : fu[(SG_TAPS_UY - 1 - ky) * SG_TAPS_UX + SG_TAPS_UX - 1 - kx]);
        up[k] = v;
    }
#endif
    for (int k = threadIdx.x; k < TAPS_D; k += THREADS) down[k] = fd[as_given ? k : TAPS_D - 1 - k];
}

// Leaky ReLU and clamp, by value or by recorded bits, at row gy and column gx of the grid.
__device__ __forceinline__ acc activate(
    const sg_filtered_lrelu_params& p, acc u, int gy, int gx, unsigned char* mask, int owned_h, int owned_w) {
    const acc slope = static_cast<acc>(p.slope);
#if SG_MODE == SG_GATE
    const int my = gy + p.mask_off_y, mx = gx + p.mask_off_x;
    if (my < 0 || mx < 0 || my >= p.mask_h || mx >= p.mask_w) return acc(0);
    const unsigned* const words =
        reinterpret_cast<const unsigned*>(mask + static_cast<long long>(my) * p.mask_row_bytes) + (mx >> 5) * 2;
    if ((words[0] >> (mx & 31)) & 1u) return u;
    return (words[1] >> (mx & 31)) & 1u ? u * slope : acc(0);
#else
    const bool positive = u > acc(0);
    acc v = positive ? u : u * slope;
    bool inside = true;
#if SG_CLAMPS
    const acc clamp = static_cast<acc>(p.clamp);
    inside = v <= clamp && v >= -clamp;
    v = v > clamp ? clamp : v;
    v = v < -clamp ? -clamp : v;
#endif
#if SG_MODE == SG_RECORD
    inside = inside && gx < p.mask_w;
    const unsigned passes = __ballot_sync(0xffffffffu, positive && inside);
    const unsigned scaled = __ballot_sync(0xffffffffu, !positive && inside);
    if (threadIdx.x % 32 == 0 && gy < owned_h && gx < owned_w) {
        unsigned* const words =
            reinterpret_cast<unsigned*>(mask + static_cast<long long>(gy) * p.mask_row_bytes) + (gx >> 5) * 2;
        words[0] = passes;
        words[1] = scaled;
    }
#endif
    return v;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) sg_filtered_lrelu_cuda(const sg_filtered_lrelu_params p) {
    SG_SHARED_MEMORY;
    acc* const up = reinterpret_cast<acc*>(sg_shared_memory);
    acc* const down = up + TAPS_U;
    acc* const grid = down + TAPS_D;             // [GRID_H][GRID_P]
    acc* const in = grid + GRID_H * GRID_P;      // [IN_H][IN_W]
    acc* const wide = in + IN_H * IN_W;          // [IN_H][GRID_P], filtered along x
    acc* const tall = in;                        // [SG_TILE_H][GRID_P], filtered along y, when the inputs are done with
    read_taps(p, up, down);
    const int tiles_x = (p.out_w + SG_TILE_W - 1) / SG_TILE_W, tiles_y = (p.out_h + SG_TILE_H - 1) / SG_TILE_H;
    const long long total = static_cast<long long>(p.n) * p.c * tiles_x * tiles_y;
    for (long long work = blockIdx.x; work < total; work += gridDim.x) {
        const int tile_x = static_cast<int>(work % tiles_x), tile_y = static_cast<int>(work / tiles_x % tiles_y);
        const long long plane = work / tiles_x / tiles_y;
        const offset_t n = static_cast<offset_t>(plane / p.c), c = static_cast<offset_t>(plane % p.c);
        const scalar* const x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) + c * static_cast<offset_t>(p.x_stride[1]);
        scalar* const y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) + c * static_cast<offset_t>(p.y_stride[1]);
        unsigned char* const mask = SG_MODE == SG_ACTIVATE ? p.mask : p.mask + plane * p.mask_h * static_cast<long long>(p.mask_row_bytes);
        const int ox0 = tile_x * SG_TILE_W, oy0 = tile_y * SG_TILE_H, gx0 = ox0 * SG_DOWN, gy0 = oy0 * SG_DOWN;
        // The bits of rows and columns that the next tile also has are the next tile's to write.
        const int owned_w = tile_x + 1 == tiles_x ? p.mask_w : gx0 + SG_TILE_W * SG_DOWN;
        const int owned_h = tile_y + 1 == tiles_y ? p.mask_h : gy0 + SG_TILE_H * SG_DOWN;
        const int ix0 = first_input(gx0, p.pad_x0), iy0 = first_input(gy0, p.pad_y0);
#if SG_HAS_BIAS
        const acc bias = load_acc(static_cast<const scalar*>(p.b) + c);
#else
        const acc bias = acc(0);
#endif
        __syncthreads();  // the tile before is done, and the taps are there
        for (int i = threadIdx.x; i < IN_H * IN_W; i += THREADS) {
            const int ix = ix0 + i % IN_W, iy = iy0 + i / IN_W;
            acc v = acc(0);
            if (ix >= 0 && iy >= 0 && ix < p.in_w && iy < p.in_h)
                v = bias + load_acc(x + static_cast<offset_t>(iy) * static_cast<offset_t>(p.x_stride[2]) + static_cast<offset_t>(ix) * static_cast<offset_t>(p.x_stride[3]));
            in[i] = v;
        }
        __syncthreads();
#if SG_SEPARABLE_U
        for (int i = threadIdx.x; i < IN_H * GRID_P; i += THREADS) {
            const int gx = gx0 + i % GRID_P, ix = first_input(gx, p.pad_x0), k = ix * SG_UP + p.pad_x0 - gx;
            const acc* const from = in + i / GRID_P * IN_W + ix - ix0;
            acc sum = acc(0);
#pragma unroll
            for (int t = 0; t < STEPS_UX; ++t) sum += up[k + t * SG_UP] * from[t];
            wide[i] = sum;
        }
        __syncthreads();
#endif
        // Whole warps: a row of the grid part is a multiple of 32.
        for (int i = threadIdx.x; i < GRID_H * GRID_P; i += THREADS) {
            const int gx = gx0 + i % GRID_P, gy = gy0 + i / GRID_P;
            const int iy = first_input(gy, p.pad_y0), ky = iy * SG_UP + p.pad_y0 - gy;
            acc sum = acc(0);
#if SG_SEPARABLE_U
            const acc* const from = wide + (iy - iy0) * GRID_P + i % GRID_P;
#pragma unroll
            for (int t = 0; t < STEPS_UY; ++t) sum += up[PADDED_UX + ky + t * SG_UP] * from[t * GRID_P];
#else
            const int ix = first_input(gx, p.pad_x0), kx = ix * SG_UP + p.pad_x0 - gx;
            const acc* const from = in + (iy - iy0) * IN_W + ix - ix0;
#pragma unroll
            for (int ty = 0; ty < STEPS_UY; ++ty)
#pragma unroll
                for (int tx = 0; tx < STEPS_UX; ++tx)
                    sum += up[(ky + ty * SG_UP) * PADDED_UX + kx + tx * SG_UP] * from[ty * IN_W + tx];
#endif
            grid[i] = activate(p, sum, gy, gx, mask, owned_h, owned_w);
        }
        __syncthreads();
#if SG_SEPARABLE_D
        for (int i = threadIdx.x; i < SG_TILE_H * GRID_P; i += THREADS) {
            const acc* const from = grid + i / GRID_P * SG_DOWN * GRID_P + i % GRID_P;
            acc sum = acc(0);
#pragma unroll
            for (int k = 0; k < SG_TAPS_DY; ++k) sum += down[k] * from[k * GRID_P];
            tall[i] = sum;
        }
        __syncthreads();
#endif
        for (int i = threadIdx.x; i < SG_TILE_H * SG_TILE_W; i += THREADS) {
            const int ox = i % SG_TILE_W, oy = i / SG_TILE_W;
            if (ox0 + ox >= p.out_w || oy0 + oy >= p.out_h) continue;
            acc sum = acc(0);
#if SG_SEPARABLE_D
            const acc* const from = tall + oy * GRID_P + ox * SG_DOWN;
#pragma unroll
            for (int k = 0; k < SG_TAPS_DX; ++k) sum += down[k] * from[k];
#else
            const acc* const from = grid + oy * SG_DOWN * GRID_P + ox * SG_DOWN;
#pragma unroll
            for (int ky = 0; ky < SG_TAPS_DY; ++ky)
#pragma unroll
                for (int kx = 0; kx < SG_TAPS_DX; ++kx) sum += down[ky * SG_TAPS_DX + kx] * from[ky * GRID_P + kx];
#endif
            store_acc(y + static_cast<offset_t>(oy0 + oy) * static_cast<offset_t>(p.y_stride[2]) + static_cast<offset_t>(ox0 + ox) * static_cast<offset_t>(p.y_stride[3]), sum);
        }
    }
}
