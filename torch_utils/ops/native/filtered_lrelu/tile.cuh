// The tile of outputs that a block of filtered_lrelu computes.
#ifndef SG_TILE_CUH
#define SG_TILE_CUH
#include "../cuda.cuh"
#include "filtered_lrelu.h"

// Two mask words for 32 elements of the grid: not clamped, above zero.
typedef vec<unsigned, 2> bits_t;

struct tile_t {
    const scalar* x;      // the image plane
    scalar* y;            // the first output
    unsigned char* mask;  // of the image plane
    acc bias;
    int ix, iy;           // of the first input
    int gx, gy;           // of the first column and row of the upsampled image
    int columns, rows;    // of outputs
    int owned_w, owned_h; // of the grid: where this tile writes mask bits
};

// The number of tiles. There are no more than elements, and divisions of 64 bits would be a tenth of all instructions.
__device__ __forceinline__ unsigned_t tiles_of(const sg_filtered_lrelu_params& p) {
    const int tiles_x = (p.out_w + SG_TILE_W - 1) / SG_TILE_W, tiles_y = (p.out_h + p.tile_h - 1) / p.tile_h;
    return static_cast<unsigned_t>(p.n) * p.c * tiles_x * tiles_y;
}

// Return a tile, by its number.
__device__ __forceinline__ tile_t tile_of(const sg_filtered_lrelu_params& p, unsigned_t number) {
    const int tiles_x = (p.out_w + SG_TILE_W - 1) / SG_TILE_W, tiles_y = (p.out_h + p.tile_h - 1) / p.tile_h;
    const unsigned_t strip = number / tiles_x, plane = strip / tiles_y;
    const int tile_x = static_cast<int>(number - strip * tiles_x), tile_y = static_cast<int>(strip - plane * tiles_y);
    const offset_t n = static_cast<offset_t>(plane / p.c);
    const offset_t c = static_cast<offset_t>(plane - n * static_cast<unsigned_t>(p.c));
    const int ox = tile_x * SG_TILE_W, oy = tile_y * p.tile_h;
    tile_t tile;
    tile.x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) +
             c * static_cast<offset_t>(p.x_stride[1]);
    tile.y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) +
             c * static_cast<offset_t>(p.y_stride[1]) + oy * static_cast<offset_t>(p.y_stride[2]) + ox;
    tile.mask =
        SG_MODE == SG_ACTIVATE ? p.mask : p.mask + static_cast<long long>(plane) * p.mask_h * p.mask_row_bytes;
    tile.bias = p.b && SG_MODE != SG_GATE ? load_acc(static_cast<const scalar*>(p.b) + c) : acc(0);
    tile.gx = ox * SG_DOWN, tile.gy = oy * SG_DOWN;
    // Exact divisions: tiles begin where the phase is the same.
    tile.ix = (tile.gx - p.pad_x0 + SG_PHASE_X) / SG_UP - SG_SHIFT;
    tile.iy = (tile.gy - p.pad_y0 + SG_PHASE_Y) / SG_UP;
    tile.columns = p.out_w - ox < SG_TILE_W ? p.out_w - ox : SG_TILE_W;
    tile.rows = p.out_h - oy < p.tile_h ? p.out_h - oy : p.tile_h;
    // Mask bits of rows and columns shared with the next tile are written by the next tile.
    tile.owned_w = tile_x + 1 == tiles_x ? p.mask_w : tile.gx + SG_TILE_W * SG_DOWN;
    tile.owned_h = tile_y + 1 == tiles_y ? p.mask_h : tile.gy + p.tile_h * SG_DOWN;
    return tile;
}

// Load rows of UNITS loads of inputs, zero outside the image, and give them to `store` with the bias, which padding
// does not have. A thread stays in its columns, with AT_ONCE loads in flight.
template <int THREADS_OF_BLOCK, int UNITS, int AT_ONCE, class Store>
__device__ __forceinline__ void read_inputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, int rows, const Store& store) {
    constexpr int span = UNITS < THREADS_OF_BLOCK ? UNITS : THREADS_OF_BLOCK, step = THREADS_OF_BLOCK / span;
    const offset_t stride_y = static_cast<offset_t>(p.x_stride[2]);
    const int first_row = static_cast<int>(threadIdx.x) / span;
    if (first_row >= step) return;
    for (int unit = static_cast<int>(threadIdx.x) % span; unit < UNITS; unit += span) {
        const int ix = tile.ix + unit * SG_LOAD;
        const bool has_column = in_range(ix, p.in_w);
        const scalar* from = tile.x + static_cast<long long>(tile.iy + first_row) * stride_y + ix;
        for (int row = first_row; row < rows; row += AT_ONCE * step) {
            elements<SG_LOAD> found[AT_ONCE];
#pragma unroll
            for (int t = 0; t < AT_ONCE; ++t, from += step * stride_y) {
                const bool exists = has_column && in_range(tile.iy + row + t * step, p.in_h);
                found[t] = read_if<SG_LOAD>(exists && row + t * step < rows, from);
            }
#pragma unroll
            for (int t = 0; t < AT_ONCE; ++t) {
                const bool exists = has_column && in_range(tile.iy + row + t * step, p.in_h);
                if (row + t * step < rows) store(row + t * step, unit, found[t], exists ? tile.bias : acc(0));
            }
        }
    }
}
#endif
