// filtered_lrelu on tensor cores, for float16 images: up and down by 2 or 4, compute capability 8.0 or higher.
//
// A block computes a tile of outputs. Of the upsampled image u, a warp computes a strip of 32 rows, from left to right,
// in pieces of 16 columns: two matrices [16 x 16], of which lane 4 * g + t has the elements in rows g and g + 8 and
// columns 2t, 2t + 1, 2t + 8 and 2t + 9. Filters are matrix products with sums in float32; what is between two of them
// is rounded to float16. `in` is the part of x that the tile needs, with the bias, and begins `shift` inputs before it.
//
//   in --- up filter ---> u [16 x 8] --- activation ---> v [16 x 8] --- down filter ---> y
//
// Up filter, separable: 8 columns of inputs are filtered along y, by A[m][k] = taps[up * k + phase_y - m], and kept as
// half of matrix A of the product with B[k][n] = taps[up * (k - shift) + phase_x - n - 8 * i], which filters along x,
// for the i-th of the up matrices u that the same inputs contribute to.
// Up filter, 2-D (up 2): even and odd rows are separate matrices, sums of a product for each row r of inputs:
//   A[m][k] = in[m + r][k],  B[k][n] = taps[2 * r + phase_y - odd][2 * (k - shift) + phase_x - n - 8 * half]
// Down filter, separable: a piece is matrix A of the filter along x for groups of 8 columns of outputs,
// B[k][n] = taps[16 * i + k - down * n] for piece i of those that a group needs. The results are stored in shared
// memory, and filtered along y by A[m][k] = taps[16 * i + k - down * m].
// Down filter, 2-D (down 2): down_2d.cuh; v is stored in shared memory.
//
// Matrices of taps have zeros where there is no such tap, and stay in registers. NaN and infinity spread to neighboring
// outputs, because 0 * NaN is NaN.
//
// SG_ACTIVATE and SG_RECORD give bit-identical outputs: they have the same tiles. The order of summation depends on the
// position in the tile.
//
// Macros: SG_DTYPE (float16), SG_UP, SG_DOWN, SG_TAPS_UX, SG_TAPS_UY, SG_TAPS_DX, SG_TAPS_DY, SG_SEPARABLE_U,
// SG_SEPARABLE_D (0, 1), SG_PHASE_X, SG_PHASE_Y (the tap of the first input of a tile), SG_MODE, SG_TILE_W (outputs per
// row of a block), SG_WARPS (of a block), SG_LOAD, SG_SHIFT (elements per load, and the position of a tile's first
// input in them), SG_STORE (elements per store), SG_BLOCKS (whose registers must fit into a multiprocessor),
// SG_INDEX_64.
#include "tile.cuh"
#include "block_sum.cuh"
#include "matrices.cuh"

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define THREADS (32 * SG_WARPS)
#define GRID_H (32 * SG_WARPS)  // rows of the upsampled image
#define PIECE_W 16
#define GROUP_W 8                             // columns of inputs or outputs of a matrix product
#define UNIT_W (GROUP_W * LARGER(SG_UP, SG_DOWN))  // columns of u with whole groups of inputs and of outputs
#define PIECES (UNIT_W / PIECE_W)             // per unit
#define GROUP_PIECES (GROUP_W * SG_DOWN / PIECE_W)  // per group of outputs
// One group more than the tile has, whose pieces only end the last of them.
#define UNITS(columns) (((UP_TO(GROUP_W, columns) + GROUP_W) * SG_DOWN + UNIT_W - 1) / UNIT_W)
#define GRID_W (UNITS(SG_TILE_W) * UNIT_W)
#define WORDS ((GRID_W + 31) / 32)
#define WORDS_P (WORDS | 1)  // an odd number of 8 bytes, so that 8 rows are in different banks
#if SG_SEPARABLE_U
#define IN_H ((GRID_H - 16) / SG_UP + 16)
#else
#define ROWS_READ ((SG_TAPS_UY - SG_PHASE_Y) / 2 + 1)  // of inputs, for an even row of u and the odd one after it
#define IN_H (GRID_H / 2 + ROWS_READ - 1)
#endif
#define IN_W (GRID_W / SG_UP + GROUP_W)
#define IN_P (UP_TO(16, IN_W) + 8)  // an odd number of 16 bytes, so that 8 rows are in different banks

// Rows of a lane in a strip: row_of(m, below) after the first one, which is ROW_STEP * g.
#define ROW_STEP (SG_SEPARABLE_U ? 1 : 2)
__device__ __forceinline__ int row_of(int m, int below) { return SG_SEPARABLE_U ? 16 * m + 8 * below : 16 * below + m; }

// Factors of the taps. Small gradients keep their digits in float16, whose taps for one element of u add up to a half
// along each axis in low-pass filters. An activation gets the gain before it.
#define SCALE_Y (SG_MODE == SG_GATE ? acc(4) : acc(1))
#define SCALE_X (SG_MODE == SG_GATE ? acc(4) : static_cast<acc>(p.up_gain))
#define OUTPUT_GAIN (SG_MODE == SG_GATE ? static_cast<acc>(p.up_gain) / 16 : acc(1))

static_assert(SG_DTYPE == SG_F16, "matrices are float16");
static_assert((SG_UP == 2 || SG_UP == 4) && (SG_DOWN == 2 || SG_DOWN == 4), "a unit is whole pieces");
static_assert((GROUP_W * SG_UP - 1 + SG_TAPS_UX - 1 - SG_PHASE_X) / SG_UP + SG_SHIFT < 16, "columns of A");
static_assert(!SG_SEPARABLE_U || (15 + SG_TAPS_UY - 1 - SG_PHASE_Y) / SG_UP < 16, "rows of inputs");
static_assert(SG_SEPARABLE_U || (SG_UP == 2 && SG_MODE == SG_GATE), "the 2-D up filter is that of a gradient");
static_assert(SG_SEPARABLE_D || (SG_DOWN == 2 && SG_MODE != SG_GATE), "the 2-D down filter is that of an output");
static_assert(SG_SHIFT < SG_LOAD && IN_W % SG_LOAD == 0, "rows are whole loads");
static_assert(SG_TILE_W % GROUP_W == 0, "a tile is whole groups");
static_assert(SG_MODE == SG_GATE || SG_TILE_W * SG_DOWN % 32 == 0, "each word of the mask has one writer");
static_assert(SG_TILE_W * SG_DOWN % (SG_UP * SG_LOAD) == 0, "tiles begin at the same place of a load");

#if SG_SEPARABLE_D
#include "down_1d.cuh"
#else
#include "down_2d.cuh"
#endif

// ---- Inputs

// Load inputs, with bias.
__device__ __forceinline__ void stage(const sg_filtered_lrelu_params& p, const tile_t& tile, scalar* in) {
    read_inputs<THREADS, IN_W / SG_LOAD, 8>(
        p, tile, IN_H, [&](int row, int unit, elements<SG_LOAD> found, acc bias) {
            if (SG_MODE != SG_GATE) {
                acc pixels[SG_LOAD];
                found.unpack(pixels);
#pragma unroll
                for (int e = 0; e < SG_LOAD; ++e) pixels[e] += bias;
                found.pack(pixels);
            }
            *reinterpret_cast<elements<SG_LOAD>*>(in + row * IN_P + unit * SG_LOAD) = found;
        });
}

// ---- The upsampled image: a piece after another, of both matrices m and both halves of the columns

#if SG_SEPARABLE_U
#define PAIRS_U 0  // in shared memory

__device__ __forceinline__ void read_up_taps(const sg_filtered_lrelu_params&, unsigned*) {}

struct upsampled_t {
    const scalar* from;        // the next columns of inputs, in the row that this lane loads
    unsigned along_y[4], along_x[SG_UP][2];
    unsigned columns[2][2][2]; // of inputs, filtered along y: [m][left or right] are the halves of a matrix A

    __device__ __forceinline__ explicit upsampled_t(const sg_filtered_lrelu_params& p) {
        const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            along_y[i] = taps(p, SG_UP * (2 * t + i / 2 * 8) + SG_PHASE_Y - g - i % 2 * 8, SCALE_Y);
#pragma unroll
        for (int i = 0; i < 2 * SG_UP; ++i)
            along_x[i / 2][i % 2] =
                taps(p, SG_UP * (2 * t + i % 2 * 8 - SG_SHIFT) + SG_PHASE_X - g - i / 2 * GROUP_W, SCALE_X);
    }

    // Begin a strip.
    __device__ __forceinline__ void start(const unsigned*, const scalar* in) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        // Matrices 0 and 1 are the rows for m = 0, 2 and 3 those for m = 1.
        from = in + ((32 * warp + lane / 16 * 16) / SG_UP + lane % 16) * IN_P;
        next_inputs();
    }

    // Two taps for neighboring inputs.
    __device__ __forceinline__ static unsigned taps(const sg_filtered_lrelu_params& p, int k, acc scale) {
        const acc* const fu = static_cast<const acc*>(p.fu);
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = k + e * SG_UP;
            pair[e] = in_range(i, SG_TAPS_UX) ? fu[p.flip_filter ? i : SG_TAPS_UX - 1 - i] * scale : acc(0);
        }
        return pack_pair(pair[0], pair[1]);
    }

    __device__ __forceinline__ void next_inputs() {
        unsigned b[4];
        load_matrices<true>(from, b);
        from += GROUP_W;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            acc filtered[4];
            set_product(along_y[0], along_y[1], along_y[2], along_y[3], b + 2 * m, filtered);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                columns[m][0][i] = columns[m][1][i];
                columns[m][1][i] = pack_pair(filtered[2 * i], filtered[2 * i + 1]);
            }
        }
    }

    // Compute piece j of a unit.
    __device__ __forceinline__ void next(int j, acc (*u)[2][4]) {
        if (j * PIECE_W % (GROUP_W * SG_UP) == 0) next_inputs();
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned *const left = columns[m][0], *const right = columns[m][1];
                set_product(left[0], left[1], right[0], right[1], along_x[(2 * j + half) % SG_UP], u[m][half]);
            }
    }
};
#else
// Taps kx and kx + 2 of a row, from kx = -ZEROS_UP on. The largest kx is 28 + SG_PHASE_X - 2 * SG_SHIFT.
#define ZEROS_UP (PIECE_W - 1 + 2 * SG_SHIFT)
#define ROW_PAIRS (PIECE_W - 1 + 29 + SG_PHASE_X)
#define PAIRS_U (SG_TAPS_UY * ROW_PAIRS)

__device__ __forceinline__ void read_up_taps(const sg_filtered_lrelu_params& p, unsigned* pairs) {
    const acc* const fu = static_cast<const acc*>(p.fu);
    for (int i = threadIdx.x; i < PAIRS_U; i += THREADS) {
        const int ky = i / ROW_PAIRS, kx = i % ROW_PAIRS - ZEROS_UP;
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = ky * SG_TAPS_UX + kx + 2 * e;
            const bool exists = in_range(kx + 2 * e, SG_TAPS_UX);
            pair[e] = exists ? fu[p.flip_filter ? k : SG_TAPS_UY * SG_TAPS_UX - 1 - k] * SCALE_Y * SCALE_X : acc(0);
        }
        pairs[i] = pack_pair(pair[0], pair[1]);
    }
}

struct upsampled_t {
    const scalar* from;  // the next inputs, in the first row that this lane loads
    unsigned up[SG_TAPS_UY][2][2];

    __device__ __forceinline__ explicit upsampled_t(const sg_filtered_lrelu_params&) {}

    // Begin a strip.
    __device__ __forceinline__ void start(const unsigned* pairs, const scalar* in) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int ky = 0; ky < SG_TAPS_UY; ++ky)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                up[ky][i / 2][i % 2] =
                    pairs[ky * ROW_PAIRS + PIECE_W - 1 + SG_PHASE_X + 4 * t - g + 16 * (i % 2) - GROUP_W * (i / 2)];
        from = in + (16 * warp + lane % 16) * IN_P + lane / 16 * 8;
    }

    // Compute the next piece; m is 1 for odd rows.
    __device__ __forceinline__ void next(int, acc (*u)[2][4]) {
#pragma unroll
        for (int r = 0; r < ROWS_READ; ++r) {
            unsigned a[4];  // rows r to r + 15: the next rows again, as moving registers costs more than loading them
            load_matrices<false>(from + r * IN_P, a);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int ky = 2 * r + SG_PHASE_Y - odd;
                if (!in_range(ky, SG_TAPS_UY)) continue;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const unsigned* const b = up[ky][half];
                    if (ky < 2) set_product(a[0], a[1], a[2], a[3], b, u[odd][half]);
                    else add_product(a[0], a[1], a[2], a[3], b, u[odd][half]);
                }
            }
        }
        from += PIECE_W / 2;
    }
};
#endif

// ---- The activation

#if SG_MODE == SG_GATE
// Load the recorded bits of a tile, zero (gradient 0) where none were recorded.
__device__ __forceinline__ void read_mask(const sg_filtered_lrelu_params& p, const tile_t& tile, bits_t* bits) {
    const int mx = tile.gx + p.mask_off_x, words = (p.mask_w + 31) >> 5, first = mx >> 5, shift = mx & 31;
#pragma unroll 4
    for (int i = threadIdx.x; i < GRID_H * WORDS; i += THREADS) {
        const int my = tile.gy + p.mask_off_y + i / WORDS, word = first + i % WORDS;
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
        bits[i / WORDS * WORDS_P + i % WORDS] = found;
    }
}
#elif SG_MODE == SG_RECORD
// Write the mask bits that this tile owns, zero beyond the mask.
__device__ __forceinline__ void write_mask(const sg_filtered_lrelu_params& p, const tile_t& tile, const bits_t* bits) {
    const int rows = tile.owned_h - tile.gy;
    for (int i = threadIdx.x; i < rows * WORDS; i += THREADS) {
        const int row = i / WORDS, column = tile.gx + i % WORDS * 32;
        if (column >= tile.owned_w) continue;
        bits_t found = bits[row * WORDS_P + i % WORDS];
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (p.mask_w - column < 32) found.v[e] &= (1u << (p.mask_w - column)) - 1;
        unsigned char* const to = tile.mask + static_cast<long long>(tile.gy + row) * p.mask_row_bytes;
        reinterpret_cast<bits_t*>(to)[column / 32] = found;
    }
}
#endif

// Leaky ReLU and clamp of the pieces of a lane, by value or by the bits of the tile.
struct activation_t {
    acc slope, clamp;
    unsigned clamps;  // twice, as float16
    bits_t* bits;     // of this lane's first row

    __device__ __forceinline__ activation_t(const sg_filtered_lrelu_params& p, bits_t* of_tile)
        : slope(static_cast<acc>(p.slope)), clamp(static_cast<acc>(p.clamp)), clamps(pack_pair(clamp, clamp)) {
        const int warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4;
        bits = of_tile + (32 * warp + ROW_STEP * g) * WORDS_P;
    }

    // Set v to the matrices A of a piece.
    __device__ __forceinline__ void operator()(int piece, const acc (*u)[2][4], unsigned (*v)[4]) const {
        const int t = static_cast<int>(threadIdx.x) % 4;
        unsigned recorded[4];  // for each m and `below`: not clamped in the low half, above zero in the high one
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int m = i / 2, below = i % 2;
#if SG_MODE == SG_GATE
            const int shift = piece % 2 * PIECE_W + 2 * t;
            const bits_t word = bits[row_of(m, below) * WORDS_P + piece / 2];
            const unsigned kept = word.v[0] >> shift, above = word.v[1] >> shift;
#endif
            unsigned found = 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                acc pair[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const unsigned bit = 1u << (8 * half + e);
                    const acc value = u[m][half][2 * below + e];
#if SG_MODE == SG_GATE
                    const acc gated = above & bit ? value : value * slope;
                    pair[e] = kept & bit ? gated : acc(0);
#else
                    const bool positive = value > acc(0);
                    const acc activated = positive ? value : value * slope;
                    if (fabs(activated) <= clamp) found |= bit;
                    if (positive) found |= bit << 16;
                    pair[e] = activated;
#endif
                }
                unsigned& packed = v[m][2 * half + below];
                packed = pack_pair(pair[0], pair[1]);
                if (SG_MODE != SG_GATE) packed = clamp_pair(packed, clamps);
            }
            recorded[i] = found << (2 * t);
        }
#if SG_MODE == SG_RECORD
        store(piece, t, recorded);
#endif
        (void)recorded;
    }

#if SG_MODE == SG_RECORD
    // Four lanes have bits of the same four rows. Lane t gets those of row t from the others, and stores them.
    __device__ __forceinline__ void store(int piece, int t, const unsigned* recorded) const {
        const bool high = t & 2, odd = t & 1;
        unsigned mine[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned kept = high ? recorded[i + 2] : recorded[i], sent = high ? recorded[i] : recorded[i + 2];
            mine[i] = kept | __shfl_xor_sync(0xffffffffu, sent, 2);
        }
        const unsigned kept = odd ? mine[1] : mine[0], sent = odd ? mine[0] : mine[1];
        const unsigned found = kept | __shfl_xor_sync(0xffffffffu, sent, 1);
        unsigned short* const to =
            reinterpret_cast<unsigned short*>(bits + row_of(t / 2, t % 2) * WORDS_P + piece / 2) + piece % 2;
        to[0] = static_cast<unsigned short>(found), to[2] = static_cast<unsigned short>(found >> 16);
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, SG_BLOCKS)
    sg_filtered_lrelu_tensor_cuda(const sg_filtered_lrelu_params p) {
    SG_SHARED_MEMORY;
    scalar* const in = reinterpret_cast<scalar*>(sg_shared_memory);
    scalar* const stored = in + IN_H * IN_P;
    bits_t* const bits = reinterpret_cast<bits_t*>(stored + STORED);
    unsigned* const up = reinterpret_cast<unsigned*>(bits + GRID_H * WORDS_P);
    unsigned* const down = up + PAIRS_U;
    read_up_taps(p, up);
    read_down_taps(p, down);
    const unsigned_t total = tiles_of(p);
    for (unsigned_t work = blockIdx.x; work < total; work += gridDim.x) {  // once, unless a grid is too small for all
        const tile_t tile = tile_of(p, work);
        upsampled_t upsampled(p);  // loads of taps do not wait for those of inputs
        const activation_t activate(p, bits);
        if (work != blockIdx.x) __syncthreads();  // the previous tile is finished
        stage(p, tile, in);
#if SG_MODE == SG_GATE
        read_mask(p, tile, bits);
#endif
        __syncthreads();
        upsampled.start(up, in);
        filtered_t filtered(down, stored);
        const int units = UNITS(tile.columns);
#if SG_UP == 2 && SG_DOWN == 2
#pragma unroll 2  // pieces, so that no registers are copied from one to the next
#else
#pragma unroll 1
#endif
        for (int unit = 0; unit < units; ++unit) {
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                acc u[2][2][4];
                unsigned v[2][4];
                upsampled.next(j, u);
                activate(unit * PIECES + j, u, v);
                filtered.take(unit * PIECES + j, j % GROUP_PIECES, v);
            }
        }
        __syncthreads();
        const acc sum = write_outputs(p, tile, stored, down);
#if SG_MODE == SG_GATE
        if (p.sums) write_sum<THREADS>(sum, reinterpret_cast<acc*>(bits), static_cast<acc*>(p.sums) + work);
#elif SG_MODE == SG_RECORD
        write_mask(p, tile, bits);
#endif
        (void)sum;
    }
}
