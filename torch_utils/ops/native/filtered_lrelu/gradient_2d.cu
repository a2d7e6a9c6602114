// The gradient of filtered_lrelu with a 2-D down filter, on tensor cores: SG_GATE with up 2, a 2-D up filter and a
// separable down filter, float16 images, compute capability 8.0 or higher.
//
// A block computes a tile of outputs. Of the upsampled image u, a warp computes a strip of 32 rows, from left to right,
// in pieces of 16 columns. Even and odd rows of a piece are separate matrices: sums of products in float32, one for
// each row r of inputs that contributes, and for each half of the columns:
//
//   u[16 x 8] += A[16 x 16] * B[16 x 8]
//   A[m][k] = in[m + r][8 * piece + k]
//   B[k][n] = taps[2 * r + phase_y - odd][2 * (k - shift) + phase_x - n - 8 * half]
//
// `in` is the part of x that the tile needs, and begins `shift` inputs before it. The lanes that hold a piece multiply
// it by its bits and have it, rounded to float16, as matrix A of the down filter along x, for a group of 8 columns of
// outputs: B[k][n] = taps[16 * i + k - down * n] for piece i of those that the group needs. The results are stored as
// float16 in shared memory, and filtered along y by products with A[m][k] = taps[16 * i + k - down * m]. B and A have
// zeros where there is no such tap, and stay in registers.
//
// NaN and infinity spread to neighboring outputs, because 0 * NaN is NaN. The order of summation depends on the
// position in the tile.
//
// Macros: SG_DTYPE (float16), SG_DOWN, SG_TAPS_UX, SG_TAPS_UY, SG_TAPS_D, SG_PHASE_X, SG_PHASE_Y (the tap of the first
// input of a tile), SG_TILE_W (outputs per row of a block), SG_WARPS (of a block), SG_LOAD, SG_SHIFT (elements per
// load, and the position of a tile's first input in them), SG_STORE (elements per store), SG_BLOCKS (whose registers
// must fit into a multiprocessor), SG_INDEX_64.
#include "filtered_lrelu.h"
#include "block_sum.cuh"
#include "matrices.cuh"

#define THREADS (32 * SG_WARPS)
#define GRID_H (32 * SG_WARPS)  // rows of the upsampled image
#define PIECE_W 16
#define GROUP_W 8                             // columns of outputs of a matrix product
#define PIECES (GROUP_W * SG_DOWN / PIECE_W)  // per group
#define GROUPS (SG_TILE_W / GROUP_W + 1)      // per tile, and one whose pieces only end the last of them
#define GRID_W (GROUPS * PIECES * PIECE_W)
#define ROWS_READ ((SG_TAPS_UY - SG_PHASE_Y) / 2 + 1)  // of inputs, for an even row of u and the odd one after it
#define IN_H (16 * SG_WARPS + UP_TO(2, ROWS_READ) - 1)
#define IN_W (GRID_W / 2 + 8)
#define IN_P (UP_TO(16, IN_W) + 8)  // an odd number of 16 bytes, so that 8 rows are in different banks
#define FILTERED_P (UP_TO(16, SG_TILE_W) + 8)
#define WORDS ((GRID_W + 31) / 32)
#define PARTS_X (((GROUP_W - 1) * SG_DOWN + SG_TAPS_D + 15) / 16)  // products for outputs of the down filter
#define PARTS_Y ((15 * SG_DOWN + SG_TAPS_D + 15) / 16)

static_assert(SG_DTYPE == SG_F16, "matrices are float16");
static_assert(SG_DOWN == 2 || SG_DOWN == 4, "a group is whole pieces");
static_assert((PIECE_W - 1 + SG_TAPS_UX - 1 - SG_PHASE_X) / 2 + SG_SHIFT < 16, "inputs of a piece are columns of A");
static_assert(SG_SHIFT < SG_LOAD && IN_W % SG_LOAD == 0, "rows are whole loads");
static_assert(PARTS_X <= 2 * PIECES, "a piece is part of two groups");
static_assert(SG_TILE_W % GROUP_W == 0 && (SG_TILE_W - 1) * SG_DOWN + SG_TAPS_D <= GRID_W, "a tile is whole groups");

// ---- Taps in shared memory, as pairs of float16, with zeros around them

// Taps kx and kx + 2 of a row, from kx = -ZEROS_UP on, times UP_GAIN, so that small gradients keep their digits in
// float16: the taps for one element of u add up to a quarter in low-pass filters. The largest kx is 28 + SG_PHASE_X - 2
// * SG_SHIFT.
#define ZEROS_UP (PIECE_W - 1 + 2 * SG_SHIFT)
#define PAIRS_UP (PIECE_W - 1 + 29 + SG_PHASE_X)
#define UP_GAIN acc(16)
// Taps k and k + 1 of the down filter, for even k from -ZEROS_DOWN on.
#define ZEROS_DOWN (15 * SG_DOWN)
#define PAIRS_DOWN ((ZEROS_DOWN + 16 * PARTS_Y) / 2)

__device__ __forceinline__ void read_taps(const sg_filtered_lrelu_params& p, unsigned* up, unsigned* down) {
    const acc *const fu = static_cast<const acc*>(p.fu), *const fd = static_cast<const acc*>(p.fd);
    const bool as_given = p.flip_filter != 0;
    for (int i = threadIdx.x; i < SG_TAPS_UY * PAIRS_UP; i += THREADS) {
        const int ky = i / PAIRS_UP, kx = i % PAIRS_UP - ZEROS_UP;
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = ky * SG_TAPS_UX + kx + 2 * e;
            const bool exists = in_range(kx + 2 * e, SG_TAPS_UX);
            pair[e] = exists ? fu[as_given ? k : SG_TAPS_UY * SG_TAPS_UX - 1 - k] * UP_GAIN : acc(0);
        }
        up[i] = pack_pair(pair[0], pair[1]);
    }
    for (int i = threadIdx.x; i < PAIRS_DOWN; i += THREADS) {
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = 2 * i - ZEROS_DOWN + e;
            pair[e] = in_range(k, SG_TAPS_D) ? fd[as_given ? k : SG_TAPS_D - 1 - k] : acc(0);
        }
        down[i] = pack_pair(pair[0], pair[1]);
    }
}

// ---- Inputs

// The tile of a block.
struct tile_t {
    const scalar* x;            // the image plane
    const unsigned char* mask;  // likewise
    int ix, iy;                 // of the first input
    int mx, my;                 // of the first element of the mask
    int columns, rows;          // of outputs
};

// Load inputs, zero outside of the image.
__device__ __forceinline__ void stage(const sg_filtered_lrelu_params& p, const tile_t& tile, scalar* in) {
    constexpr int units = IN_W / SG_LOAD, at_once = 8;
    const offset_t stride_y = static_cast<offset_t>(p.x_stride[2]);
#pragma unroll 1
    for (int first = threadIdx.x; first < IN_H * units; first += at_once * THREADS) {
        elements<SG_LOAD> fetched[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const int unit = first + i * THREADS, row = unit / units;
            const int ix = tile.ix + unit % units * SG_LOAD, iy = tile.iy + row;
            const bool exists = row < IN_H && in_range(ix, p.in_w) && in_range(iy, p.in_h);
            fetched[i] = read_if<SG_LOAD>(exists, tile.x + iy * stride_y + ix);
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const int unit = first + i * THREADS, row = unit / units;
            scalar* const to = in + row * IN_P + unit % units * SG_LOAD;
            if (row < IN_H) *reinterpret_cast<elements<SG_LOAD>*>(to) = fetched[i];
        }
    }
}

// Two mask words for 32 elements of the grid: not clamped, above zero.
typedef vec<unsigned, 2> bits_t;

// Load the recorded bits of a tile, zero (gradient 0) where none were recorded.
__device__ __forceinline__ void read_mask(const sg_filtered_lrelu_params& p, const tile_t& tile, bits_t* bits) {
    const int words = (p.mask_w + 31) >> 5, first = tile.mx >> 5, shift = tile.mx & 31;
#pragma unroll 4
    for (int i = threadIdx.x; i < GRID_H * WORDS; i += THREADS) {
        const int my = tile.my + i / WORDS, word = first + i % WORDS;
        const bits_t* const from =
            reinterpret_cast<const bits_t*>(tile.mask + static_cast<long long>(my) * p.mask_row_bytes) + word;
        bits_t left = {}, right = {}, found;
        if (in_range(my, p.mask_h) && in_range(word, words)) left = from[0];
        if (in_range(my, p.mask_h) && in_range(word + 1, words)) right = from[1];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const unsigned long long both = static_cast<unsigned long long>(right.v[e]) << 32 | left.v[e];
            found.v[e] = static_cast<unsigned>(both >> shift);
        }
        bits[i] = found;
    }
}

// ---- The upsampled image, and the down filter along x

__device__ __forceinline__ void filter_strip(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const scalar* in, const bits_t* bits,
    const unsigned* up_pairs, const unsigned* down_pairs, scalar* filtered) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const acc slope = static_cast<acc>(p.slope);
    unsigned up[SG_TAPS_UY][2][2], down[2 * PIECES][2];
#pragma unroll
    for (int ky = 0; ky < SG_TAPS_UY; ++ky)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            up[ky][i / 2][i % 2] =
                up_pairs[ky * PAIRS_UP + PIECE_W - 1 + SG_PHASE_X + 4 * t - g + 16 * (i % 2) - GROUP_W * (i / 2)];
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i)
        down[i / 2][i % 2] =
            i / 2 < PARTS_X ? down_pairs[(ZEROS_DOWN + 16 * (i / 2) + 2 * t + 8 * (i % 2) - SG_DOWN * g) / 2] : 0u;
    // Matrices 0 and 1 are rows r to r + 15 of inputs, 2 and 3 those from r + 1 on.
    const scalar* from = in + (16 * warp + lane % 16 + lane / 16) * IN_P;
    unsigned left[UP_TO(2, ROWS_READ)][2];
#pragma unroll
    for (int r = 0; r < ROWS_READ; r += 2) {
        unsigned found[4];
        load_matrices(from + r * IN_P, found);
        left[r][0] = found[0], left[r][1] = found[1], left[r + 1][0] = found[2], left[r + 1][1] = found[3];
    }
    const bits_t* mine = bits + (32 * warp + 2 * g) * WORDS;
    scalar* to = filtered + (32 * warp + 2 * g) * FILTERED_P + 2 * t - GROUP_W;
    acc sums[2][2][4] = {};  // of even and odd rows, for the group of outputs that ends here and for the next
    const int groups = (tile.columns + GROUP_W - 1) / GROUP_W + 1;
#if SG_DOWN == 2
#pragma unroll 2  // pieces, so that no registers are copied from one to the next
#else
#pragma unroll 1
#endif
    for (int group = 0; group < groups; ++group, to += GROUP_W) {
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
            acc u[2][2][4];
            unsigned right[4];
            from += PIECE_W / 2;
#pragma unroll
            for (int r = 0; r < UP_TO(2, ROWS_READ); ++r) {
                if (r % 2 == 0) load_matrices(from + r * IN_P, right);
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int ky = 2 * r + SG_PHASE_Y - odd;
                    if (!in_range(ky, SG_TAPS_UY)) continue;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const unsigned *const a = right + r % 2 * 2, *const b = up[ky][half];
                        if (ky < 2) set_product(left[r][0], left[r][1], a[0], a[1], b, u[odd][half]);
                        else add_product(left[r][0], left[r][1], a[0], a[1], b, u[odd][half]);
                    }
                }
                left[r][0] = right[r % 2 * 2], left[r][1] = right[r % 2 * 2 + 1];
            }
            const int piece = group * PIECES + j, shift = piece % 2 * PIECE_W + 2 * t;
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                unsigned a[4];
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const bits_t word = mine[(odd + 16 * below) * WORDS + piece / 2];
                    const unsigned kept = word.v[0] >> shift, above = word.v[1] >> shift;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        acc pair[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const unsigned bit = 1u << (8 * half + e);
                            const acc value = u[odd][half][2 * below + e];
                            const acc v = above & bit ? value : value * slope;
                            pair[e] = kept & bit ? v : acc(0);
                        }
                        a[2 * half + below] = pack_pair(pair[0], pair[1]);
                    }
                }
                add_product(a[0], a[1], a[2], a[3], down[j + PIECES], sums[odd][0]);
                add_product(a[0], a[1], a[2], a[3], down[j], sums[odd][1]);
            }
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
            for (int below = 0; below < 2; ++below)
                if (group > 0) write<2>(to + (odd + 16 * below) * FILTERED_P, sums[odd][0] + 2 * below);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[odd][0][i] = sums[odd][1][i], sums[odd][1][i] = acc(0);
        }
    }
}

// ---- The down filter along y

// Filter along y and write the outputs, of which the sum is returned; a warp has squares of 16 x 16 outputs.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const scalar* filtered, const unsigned* down_pairs,
    scalar* y) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    unsigned down[PARTS_Y][4];
#pragma unroll
    for (int part = 0; part < PARTS_Y; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            down[part][i] =
                down_pairs[(ZEROS_DOWN + 16 * part + 2 * t + 8 * (i / 2) - SG_DOWN * (g + 8 * (i % 2))) / 2];
    const acc gain = static_cast<acc>(p.up_gain) / UP_GAIN;
    const offset_t stride_y = static_cast<offset_t>(p.y_stride[2]);
    acc total = acc(0);
    const int across = (tile.columns + 15) / 16, squares = (tile.rows + 15) / 16 * across;
    for (int square = warp; square < squares; square += SG_WARPS) {
        const int first_row = square / across * 16, first_column = square % across * 16;
        const scalar* const from =
            filtered + (first_row * SG_DOWN + lane % 16) * FILTERED_P + first_column + lane / 16 * 8;
        acc sums[2][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS_Y; ++part) {
            if (first_row * SG_DOWN + 16 * part >= GRID_H) break;  // rows that the tile does not need
            unsigned b[4];
            load_transposed(from + 16 * part * FILTERED_P, b);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                add_product(
                    down[part][0], down[part][1], down[part][2], down[part][3], b + 2 * half, sums[half]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, below = i % 2;
            const int row = first_row + g + 8 * below, column = first_column + 8 * half + 2 * t;
            if (row >= tile.rows) continue;
            const acc found[2] = {sums[half][2 * below] * gain, sums[half][2 * below + 1] * gain};
#pragma unroll
            for (int c = 0; c < 2; c += SG_STORE) {
                if (column + c >= tile.columns) continue;
                write<SG_STORE>(y + row * stride_y + column + c, found + c);
                total += sum_of<SG_STORE>(found + c);
            }
        }
    }
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS, SG_BLOCKS)
    sg_filtered_lrelu_gradient_cuda(const sg_filtered_lrelu_params p) {
    SG_SHARED_MEMORY;
    scalar* const in = reinterpret_cast<scalar*>(sg_shared_memory);
    scalar* const filtered = in + IN_H * IN_P;
    bits_t* const bits = reinterpret_cast<bits_t*>(filtered + GRID_H * FILTERED_P);
    unsigned* const up = reinterpret_cast<unsigned*>(bits + GRID_H * WORDS);
    unsigned* const down = up + SG_TAPS_UY * PAIRS_UP;
    read_taps(p, up, down);
    const int tiles_x = (p.out_w + SG_TILE_W - 1) / SG_TILE_W, tiles_y = (p.out_h + p.tile_h - 1) / p.tile_h;
    const unsigned_t total = static_cast<unsigned_t>(p.n) * p.c * tiles_x * tiles_y;
    for (unsigned_t work = blockIdx.x; work < total; work += gridDim.x) {
        const unsigned_t strip = work / tiles_x, plane = strip / tiles_y;
        const int tile_x = static_cast<int>(work - strip * tiles_x), tile_y = static_cast<int>(strip - plane * tiles_y);
        const offset_t n = static_cast<offset_t>(plane / p.c);
        const offset_t c = static_cast<offset_t>(plane - n * static_cast<unsigned_t>(p.c));
        const int ox = tile_x * SG_TILE_W, oy = tile_y * p.tile_h;
        tile_t tile;
        tile.x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) +
                 c * static_cast<offset_t>(p.x_stride[1]);
        tile.mask = p.mask + static_cast<long long>(plane) * p.mask_h * p.mask_row_bytes;
        // Exact divisions: tiles begin where the phase is the same.
        tile.ix = (ox * SG_DOWN - p.pad_x0 + SG_PHASE_X) / 2 - SG_SHIFT;
        tile.iy = (oy * SG_DOWN - p.pad_y0 + SG_PHASE_Y) / 2;
        tile.mx = ox * SG_DOWN + p.mask_off_x, tile.my = oy * SG_DOWN + p.mask_off_y;
        tile.columns = p.out_w - ox < SG_TILE_W ? p.out_w - ox : SG_TILE_W;
        tile.rows = p.out_h - oy < p.tile_h ? p.out_h - oy : p.tile_h;
        if (work != blockIdx.x) __syncthreads();  // the previous tile is finished
        stage(p, tile, in);
        read_mask(p, tile, bits);
        __syncthreads();
        filter_strip(p, tile, in, bits, up, down, filtered);
        __syncthreads();
        scalar* const y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) +
                          c * static_cast<offset_t>(p.y_stride[1]) + oy * static_cast<offset_t>(p.y_stride[2]) + ox;
        const acc total = write_outputs(p, tile, filtered, down, y);
        if (p.sums) write_sum<THREADS>(total, reinterpret_cast<acc*>(bits), static_cast<acc*>(p.sums) + work);
    }
}
