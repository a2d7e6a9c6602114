// filtered_lrelu on CUDA. A block computes a tile of outputs of one image plane, a thread one column of the upsampled
// image. Going down its column, a thread keeps incomplete rows (to which further inputs contribute) in registers: rows
// of the upsampled image and of the filtered outputs. Nothing of upsampled height is stored in memory.
//
//     x, an image plane            in [inputs][IN_P], shared            wide [inputs][WIDE_P], shared
//   +--------------------+        +--------------------+  filter_rows  +------------------------------------+
//   |   +------------+   | stage  | pixels + bias,     |  up filter    | filtered along x, upsampled there; |
//   |   | tile, with |   | -----> | zeros outside      |  ---------->  | rows as in x                       |
//   |   | its border |   |        | of the image       |  along x      +------------------------------------+
//   |   +------------+   |        +--------------------+                  |   |   |   one thread a column   |
//   +--------------------+                                                v   v   v                         v
//                                                                upsampled_t   up filter along y    | a block of
//                                                                activation_t  leaky ReLU, clamp    | SG_PERIOD rows
//                                                                filtered_t    down filter along y  v after another
//     y                            filtered [tile_h][THREADS], shared (in the memory of `in`)
//   +--------------------+         +------------------------------------+
//   |   +------------+   | write_  | rows as in y,                      |
//   |   | SG_TILE_W  |   | outputs | columns of the upsampled image     |
//   |   | x tile_h   |   | <------ |                                    |
//   |   +------------+   | down    +------------------------------------+
//   +--------------------+ along x
//
// A 2-D up filter is applied in upsampled_t, straight from `in`; before a 2-D down filter, all rows of the tile's part
// of the upsampled image (the grid) are stored in shared memory. Mask bits are collected there as well. (Most layers in
// float16 are computed by tensor_cores.cu.)
//
// The mapping of taps to rows and columns is a compile-time constant, since every tile starts with the same phase.
//
// Macros: SG_DTYPE, SG_UP, SG_DOWN, SG_PERIOD (their least common multiple), SG_TAPS_UX, SG_TAPS_UY, SG_TAPS_DX,
// SG_TAPS_DY, SG_SEPARABLE_U, SG_SEPARABLE_D (0, 1), SG_PHASE_X, SG_PHASE_Y (the tap of the first input of
// a tile), SG_MODE, SG_CLAMPS (0, 1), SG_TILE_W (outputs per row of a block; the number of rows is a launch argument),
// SG_LOAD, SG_SHIFT (elements per load, and the position of a tile's first input in them), SG_STORE (elements
// per store), SG_UNROLL (0: filters too large to unroll), SG_BLOCKS (whose registers must fit into a multiprocessor),
// SG_INDEX_64.
//
// SG_ACTIVATE and SG_RECORD give bit-identical outputs for all tiles: sums are in the order of the taps, and
// multiply-adds are explicit, so the compiler does not decide which products are rounded.
//
// A row of the mask: for each 32 columns a word "not clamped" and a word "above zero" (warp ballots). With SG_RECORD,
// tiles begin at multiples of 32 columns of the grid, so each word has one writer.
#include "tile.cuh"
#include "block_sum.cuh"

#if SG_UNROLL
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("unroll 1")
#endif
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

// ---- Columns

#define GRID_W(columns) (((columns) - 1) * SG_DOWN + SG_TAPS_DX)  // columns of the upsampled image that outputs need
#define THREADS UP_TO(32, GRID_W(SG_TILE_W))
#define STEPS_X ((SG_TAPS_UX + SG_UP - 1) / SG_UP)  // taps per input pixel
// Input of a column, relative to the tile's first.
#define FIRST_X(column) (((column) - SG_PHASE_X + SG_UP - 1) / SG_UP)
#define RUN (SG_UP * QUAD)                          // columns per thread in the filter along x
#define WIDE_P UP_TO(RUN, THREADS)
#define READS_X UP_TO(QUAD, SG_SHIFT + FIRST_X(RUN - 1) + STEPS_X)
#define IN_P UP_TO(LARGER(QUAD, SG_LOAD), (WIDE_P / RUN - 1) * QUAD + READS_X)
#define WORDS (THREADS / 32 + (SG_MODE == SG_GATE ? 1 : 0))  // mask words per row of a tile; SG_GATE is not aligned

// ---- Rows, in blocks of SG_PERIOD rows of the upsampled image

#define INPUTS (SG_PERIOD / SG_UP)     // rows of a block
#define OUTPUTS (SG_PERIOD / SG_DOWN)
// Input rows that the first block needs before its own.
#define EARLY ((SG_PERIOD + SG_TAPS_UY - 2 - SG_PHASE_Y) / SG_UP + 1 - INPUTS)
// Rows that the current inputs contribute to.
#define OPEN_U LARGER(SG_PERIOD, (EARLY + INPUTS - 1) * SG_UP + SG_PHASE_Y + 1)
#define LATE ((SG_TAPS_DY + SG_DOWN - 1) / SG_DOWN - 1)  // incomplete rows of outputs from earlier blocks
#define OPEN_D (OUTPUTS + LATE)
#define BLOCKS(rows) ((((rows) - 1) * SG_DOWN + SG_TAPS_DY + SG_PERIOD - 1) / SG_PERIOD)

// ---- The 2-D down filter: outputs of a thread, and rows of the grid in two halves, even and odd quads, so that
// neighboring threads read neighboring quads

#define COLUMNS_2D (2 * QUAD % SG_DOWN == 0 ? 2 * QUAD / SG_DOWN : 1)
#define ROWS_2D 4
#define IN_HALVES (COLUMNS_2D * SG_DOWN == 2 * QUAD)
#define HALF (THREADS / 2 + (THREADS % 64 == 0 ? 16 : 0))
#define GRID_P (2 * HALF)
#define GRID_ACCS(rows) ((rows) * GRID_P)

// ---- The 1-D down filter along x

#define COLUMNS (QUAD % SG_DOWN == 0 ? QUAD / SG_DOWN : 1)

// ---- Taps in shared memory

#define PADDED_UX (STEPS_X * SG_UP)
#define PADDED_DX UP_TO(QUAD, SG_TAPS_DX)
#define TAPS_U (SG_SEPARABLE_U ? SG_TAPS_UX + SG_TAPS_UY : SG_TAPS_UY * PADDED_UX)  // along x, then along y
#define TAPS_D (SG_SEPARABLE_D ? SG_TAPS_DX : SG_TAPS_DY * PADDED_DX)

// Load the taps in correlation order; those of the up filter (along y) include the gain.
__device__ __forceinline__ void read_taps(const sg_filtered_lrelu_params& p, acc* up, acc* down) {
    const acc *const fu = static_cast<const acc*>(p.fu), *const fd = static_cast<const acc*>(p.fd);
    const acc gain = static_cast<acc>(p.up_gain);
    const bool as_given = p.flip_filter != 0;
    for (int k = threadIdx.x; k < TAPS_U; k += THREADS) {
#if SG_SEPARABLE_U
        const int i = k < SG_TAPS_UX ? k : k - SG_TAPS_UX;
        up[k] = fu[as_given ? i : SG_TAPS_UX - 1 - i] * (k < SG_TAPS_UX ? acc(1) : gain);
#else
        const int ky = k / PADDED_UX, kx = k % PADDED_UX, i = ky * SG_TAPS_UX + kx;
        up[k] = kx < SG_TAPS_UX ? fu[as_given ? i : SG_TAPS_UY * SG_TAPS_UX - 1 - i] * gain : acc(0);
#endif
    }
    for (int k = threadIdx.x; k < TAPS_D; k += THREADS) {
#if SG_SEPARABLE_D
        down[k] = fd[as_given ? k : SG_TAPS_DX - 1 - k];
#else
        const int ky = k / PADDED_DX, kx = k % PADDED_DX, i = ky * SG_TAPS_DX + kx;
        down[k] = kx < SG_TAPS_DX ? fd[as_given ? i : SG_TAPS_DY * SG_TAPS_DX - 1 - i] : acc(0);
#endif
    }
}

// ---- Inputs

// Load input rows, with bias.
__device__ __forceinline__ void stage(const sg_filtered_lrelu_params& p, const tile_t& tile, int rows, acc* in) {
    constexpr int part = SG_LOAD < QUAD ? SG_LOAD : QUAD;
    read_inputs<THREADS, IN_P / SG_LOAD, 4>(
        p, tile, rows, [&](int row, int unit, const elements<SG_LOAD>& found, acc bias) {
            acc pixels[SG_LOAD];
            found.unpack(pixels);
#pragma unroll
            for (int k = 0; k < SG_LOAD; k += part) {
                vec<acc, part> values;
#pragma unroll
                for (int e = 0; e < part; ++e) values.v[e] = bias + pixels[k + e];
                *reinterpret_cast<vec<acc, part>*>(in + row * IN_P + unit * SG_LOAD + k) = values;
            }
        });
}

#if SG_MODE == SG_GATE
// Load the recorded bits of a tile, zero (gradient 0) where none were recorded.
__device__ __forceinline__ void read_mask(
    const sg_filtered_lrelu_params& p, const tile_t& tile, int rows, bits_t* bits) {
    const int first = (tile.gx + p.mask_off_x) >> 5, words = (p.mask_w + 31) >> 5;
    for (int i = threadIdx.x; i < rows * WORDS; i += THREADS) {
        const int my = tile.gy + p.mask_off_y + i / WORDS, word = first + i % WORDS;
        bits_t found = {};
        if (in_range(my, p.mask_h) && in_range(word, words))
            found = reinterpret_cast<const bits_t*>(tile.mask + static_cast<long long>(my) * p.mask_row_bytes)[word];
        bits[i] = found;
    }
}
#elif SG_MODE == SG_RECORD
// Write the mask bits that this tile owns.
__device__ __forceinline__ void write_mask(const sg_filtered_lrelu_params& p, const tile_t& tile, const bits_t* bits) {
    const int rows = tile.owned_h - tile.gy;
    for (int i = threadIdx.x; i < rows * WORDS; i += THREADS) {
        const int row = i / WORDS, word = i % WORDS;
        unsigned char* const to = tile.mask + static_cast<long long>(tile.gy + row) * p.mask_row_bytes;
        if (tile.gx + word * 32 < tile.owned_w) reinterpret_cast<bits_t*>(to)[tile.gx / 32 + word] = bits[i];
    }
}
#endif

#if SG_SEPARABLE_U
// Filter the rows of inputs along x.
__device__ __forceinline__ void filter_rows(const acc* shared_taps, const acc* in, int rows, acc* wide) {
#if SG_UNROLL
    acc taps[SG_TAPS_UX];
#pragma unroll
    for (int k = 0; k < SG_TAPS_UX; ++k) taps[k] = shared_taps[k];
#else
    const acc* const taps = shared_taps;
#endif
    constexpr int runs = WIDE_P / RUN;
    for (int i = threadIdx.x; i < rows * runs; i += THREADS) {
        const int row = i / runs, run = i % runs;
        acc values[READS_X];
        read_shared<READS_X, QUAD>(in + row * IN_P + run * QUAD, values);
        acc* const to = wide + row * WIDE_P + run * RUN;
UNROLL
        for (int column = 0; column < RUN; column += QUAD) {
            vec<acc, QUAD> sums = {};
UNROLL
            for (int c = 0; c < QUAD; ++c) {
UNROLL
                for (int t = 0; t < STEPS_X; ++t) {
                    const int input = FIRST_X(column + c) + t, k = input * SG_UP + SG_PHASE_X - column - c;
                    if (in_range(k, SG_TAPS_UX)) sums.v[c] = mul_add(taps[k], values[SG_SHIFT + input], sums.v[c]);
                }
            }
            *reinterpret_cast<vec<acc, QUAD>*>(to + column) = sums;
        }
    }
}
#endif

// ---- Down a column

// Leaky ReLU and clamp, by value or by recorded bits, for successive rows of the tile's part of the grid.
struct activation_t {
    acc slope, clamp;
#if SG_MODE == SG_GATE
    const bits_t* bits;  // of this column, in the next row
    unsigned mine;       // the bit of this column
#elif SG_MODE == SG_RECORD
    bits_t* bits;        // of this warp, in the next row
    bool writes;         // one lane of a warp
    bool recorded;       // column of the mask
#endif

    __device__ __forceinline__ activation_t(const sg_filtered_lrelu_params& p, const tile_t& tile, void* shared_bits)
        : slope(static_cast<acc>(p.slope)), clamp(static_cast<acc>(p.clamp)) {
        const int column = static_cast<int>(threadIdx.x);
#if SG_MODE == SG_GATE
        const int mx = tile.gx + p.mask_off_x + column;
        bits = static_cast<const bits_t*>(shared_bits) + ((mx >> 5) - ((tile.gx + p.mask_off_x) >> 5));
        mine = 1u << (mx & 31);
#elif SG_MODE == SG_RECORD
        bits = static_cast<bits_t*>(shared_bits) + column / 32;
        writes = column % 32 == 0;
        recorded = tile.gx + column < p.mask_w;
#endif
        (void)column;
    }

    // Row s of a block.
    __device__ __forceinline__ acc operator()(acc u, int s) const {
#if SG_MODE == SG_GATE
        const bits_t found = bits[s * WORDS];
        const acc v = found.v[1] & mine ? u : u * slope;
        return found.v[0] & mine ? v : acc(0);
#else
        const bool positive = u > acc(0);
        const acc v = positive ? u : u * slope;
#if SG_MODE == SG_RECORD
        bits_t votes;
        votes.v[0] = __ballot_sync(0xffffffffu, SG_CLAMPS ? recorded && fabs(v) <= clamp : recorded);
        votes.v[1] = __ballot_sync(0xffffffffu, positive);
        if (writes) bits[s * WORDS] = votes;
#endif
        return SG_CLAMPS ? clamp_to(v, clamp) : v;
#endif
    }

    __device__ __forceinline__ void next_block() {
#if SG_MODE != SG_ACTIVATE
        bits += SG_PERIOD * WORDS;
#endif
    }
};

#define KEEPS_TAPS_2D (SG_UNROLL && !SG_SEPARABLE_U && SG_TAPS_UY * STEPS_X <= 80)  // in registers

// The up filter along y (or all of a 2-D one) for one column, with its incomplete rows.
struct upsampled_t {
    const acc* from;  // the next row of inputs
#if SG_SEPARABLE_U
    acc taps[SG_TAPS_UY];
#elif KEEPS_TAPS_2D
    acc taps[SG_TAPS_UY * STEPS_X];
#else
    const acc* taps;
#endif
    acc rows[OPEN_U];

    __device__ __forceinline__ upsampled_t(const acc* shared_taps, const acc* in, const acc* wide) {
        const int column = static_cast<int>(threadIdx.x);
#if SG_SEPARABLE_U
        from = wide + column;
UNROLL
        for (int k = 0; k < SG_TAPS_UY; ++k) taps[k] = shared_taps[SG_TAPS_UX + k];
#else
        const int first = FIRST_X(column);
        from = in + SG_SHIFT + first;
        const acc* const mine = shared_taps + first * SG_UP + SG_PHASE_X - column;
#if KEEPS_TAPS_2D
#pragma unroll
        for (int ky = 0; ky < SG_TAPS_UY; ++ky)
#pragma unroll
            for (int t = 0; t < STEPS_X; ++t) taps[ky * STEPS_X + t] = mine[ky * PADDED_UX + t * SG_UP];
#else
        taps = mine;
#endif
#endif
UNROLL
        for (int s = 0; s < OPEN_U; ++s) rows[s] = acc(0);
    }

    // Add the contributions of the next row of inputs, number `input` of a block, to the rows of the block.
    __device__ __forceinline__ void take(int input) {
#if SG_SEPARABLE_U
        const acc value = *from;
        from += WIDE_P;
UNROLL
        for (int s = 0; s < OPEN_U; ++s) {
            const int k = (EARLY + input) * SG_UP + SG_PHASE_Y - s;
            if (in_range(k, SG_TAPS_UY)) rows[s] = mul_add(taps[k], value, rows[s]);
        }
#else
        acc values[STEPS_X];
UNROLL
        for (int t = 0; t < STEPS_X; ++t) values[t] = from[t];
        from += IN_P;
UNROLL
        for (int s = 0; s < OPEN_U; ++s) {
            const int k = (EARLY + input) * SG_UP + SG_PHASE_Y - s;
            if (!in_range(k, SG_TAPS_UY)) continue;
UNROLL
            for (int t = 0; t < STEPS_X; ++t) {
#if KEEPS_TAPS_2D
                rows[s] = mul_add(taps[k * STEPS_X + t], values[t], rows[s]);
#else
                rows[s] = mul_add(taps[k * PADDED_UX + t * SG_UP], values[t], rows[s]);
#endif
            }
        }
#endif
    }

    __device__ __forceinline__ void next_block() {
UNROLL
        for (int s = 0; s < OPEN_U; ++s) rows[s] = s + SG_PERIOD < OPEN_U ? rows[(s + SG_PERIOD) % OPEN_U] : acc(0);
    }
};

#if SG_SEPARABLE_D
// The down filter along y for one column, with its incomplete rows of outputs.
struct filtered_t {
    acc* to;  // this column of the rows filtered along y, from the first incomplete one on
    acc taps[SG_TAPS_DY];
    acc rows[OPEN_D];

    __device__ __forceinline__ filtered_t(const acc* shared_taps, acc* area)
        : to(area + static_cast<int>(threadIdx.x) - LATE * THREADS) {
UNROLL
        for (int k = 0; k < SG_TAPS_DY; ++k) taps[k] = shared_taps[k];
UNROLL
        for (int a = 0; a < OPEN_D; ++a) rows[a] = acc(0);
    }

    // Add the contributions of row s of a block.
    __device__ __forceinline__ void take(acc v, int s) {
UNROLL
        for (int a = 0; a < OPEN_D; ++a) {
            const int k = s - (a - LATE) * SG_DOWN;
            if (in_range(k, SG_TAPS_DY)) rows[a] = mul_add(taps[k], v, rows[a]);
        }
    }

    // Store the outputs that block b has completed.
    __device__ __forceinline__ void next_block(int b, int count) {
UNROLL
        for (int a = 0; a < OUTPUTS; ++a) {
            const int j = b * OUTPUTS + a - LATE;
            if (in_range(j, count)) to[a * THREADS] = rows[a];
        }
        to += OUTPUTS * THREADS;
UNROLL
        for (int a = 0; a < OPEN_D; ++a) rows[a] = a + OUTPUTS < OPEN_D ? rows[(a + OUTPUTS) % OPEN_D] : acc(0);
    }
};

// Filter the rows along x and write the outputs, of which the sum is returned. A thread stays in its columns.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const acc* shared_taps, const acc* tall) {
#if SG_UNROLL
    acc taps[SG_TAPS_DX];
#pragma unroll
    for (int k = 0; k < SG_TAPS_DX; ++k) taps[k] = shared_taps[k];
#else
    const acc* const taps = shared_taps;
#endif
    constexpr int groups = SG_TILE_W / COLUMNS, step = THREADS / groups, at_once = WIDEST(COLUMNS * SG_DOWN);
    constexpr int reads = UP_TO(at_once, (COLUMNS - 1) * SG_DOWN + SG_TAPS_DX);
    static_assert(step >= 1, "a thread has outputs of one column group");
    const int first_row = static_cast<int>(threadIdx.x) / groups;
    const int column = static_cast<int>(threadIdx.x) % groups * COLUMNS;
    acc total = acc(0);
    if (first_row >= step || column >= tile.columns) return total;
    const offset_t stride_y = static_cast<offset_t>(p.y_stride[2]);
    const acc* from = tall + first_row * THREADS + column * SG_DOWN;
    scalar* to = tile.y + first_row * stride_y + column;
#pragma unroll 2
    for (int row = first_row; row < tile.rows; row += step, from += step * THREADS, to += step * stride_y) {
        acc values[reads], sums[COLUMNS] = {};
        read_shared<reads, at_once>(from, values);
UNROLL
        for (int c = 0; c < COLUMNS; ++c)
UNROLL
            for (int k = 0; k < SG_TAPS_DX; ++k) sums[c] = mul_add(taps[k], values[c * SG_DOWN + k], sums[c]);
#pragma unroll
        for (int c = 0; c < COLUMNS; c += SG_STORE) {
            if (column + c >= tile.columns) continue;
            write<SG_STORE>(to + c, sums + c);
            total += sum_of<SG_STORE>(sums + c);
        }
    }
    return total;
}
#else
__device__ __forceinline__ int place(int column) {  // in a row of the grid
    if (!IN_HALVES) return column;
    return column / QUAD % 2 * HALF + column / (2 * QUAD) * QUAD + column % QUAD;
}

struct filtered_t {
    acc* to;  // this column of the grid, from the next row on

    __device__ __forceinline__ filtered_t(const acc*, acc* area) : to(area + place(threadIdx.x)) {}
    __device__ __forceinline__ void take(acc v, int s) { to[s * GRID_P] = v; }
    __device__ __forceinline__ void next_block(int, int) { to += SG_PERIOD * GRID_P; }
};

// Filter the grid and write the outputs, of which the sum is returned; a thread has a few in each of a few rows.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const acc* taps, const acc* grid) {
    acc total = acc(0);
    constexpr int groups = SG_TILE_W / COLUMNS_2D;
    constexpr int at_once = IN_HALVES ? QUAD : 1, reads = UP_TO(at_once, (COLUMNS_2D - 1) * SG_DOWN + SG_TAPS_DX);
    for (int i = threadIdx.x; i < (tile.rows + ROWS_2D - 1) / ROWS_2D * groups; i += THREADS) {
        const int row = i / groups * ROWS_2D, group = i % groups, column = group * COLUMNS_2D;
        if (column >= tile.columns) continue;
        acc sums[ROWS_2D][COLUMNS_2D] = {};
        const acc* from = grid + row * SG_DOWN * GRID_P + (IN_HALVES ? group * QUAD : column * SG_DOWN);
UNROLL
        for (int r = 0; r < (ROWS_2D - 1) * SG_DOWN + SG_TAPS_DY; ++r, from += GRID_P) {
#if SG_UNROLL
            acc values[reads];
#pragma unroll
            for (int at = 0; at < reads; at += at_once) read_shared<at_once, at_once>(from + place(at), values + at);
#endif
UNROLL
            for (int j = 0; j < ROWS_2D; ++j) {
                const int ky = r - j * SG_DOWN;
                if (!in_range(ky, SG_TAPS_DY)) continue;
UNROLL
                for (int kx = 0; kx < SG_TAPS_DX; ++kx) {
                    const acc tap = taps[ky * PADDED_DX + kx];
UNROLL
                    for (int c = 0; c < COLUMNS_2D; ++c) {
                        const int at = c * SG_DOWN + kx;
#if SG_UNROLL
                        sums[j][c] = mul_add(tap, values[at], sums[j][c]);
#else
                        sums[j][c] = mul_add(tap, from[place(at)], sums[j][c]);
#endif
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < ROWS_2D; ++j) {
            scalar* const to = tile.y + (row + j) * static_cast<offset_t>(p.y_stride[2]) + column;
            if (row + j >= tile.rows) continue;
#pragma unroll
            for (int c = 0; c < COLUMNS_2D; c += SG_STORE) {
                if (column + c >= tile.columns) continue;
                write<SG_STORE>(to + c, sums[j] + c);
                total += sum_of<SG_STORE>(sums[j] + c);
            }
        }
    }
    return total;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, SG_BLOCKS)
    sg_filtered_lrelu_cuda(const sg_filtered_lrelu_params p) {
    SG_SHARED_MEMORY;
    const int all_blocks = BLOCKS(p.tile_h), all_inputs = EARLY + all_blocks * INPUTS;
#if SG_SEPARABLE_D
    const int filtered_accs = p.tile_h * THREADS;
#else
    const int filtered_accs = GRID_ACCS(all_blocks * SG_PERIOD);
#endif
    const int in_accs = all_inputs * IN_P;
    acc* const up = reinterpret_cast<acc*>(sg_shared_memory);
    acc* const down = up + UP_TO(QUAD, TAPS_U);
    acc* const in = down + UP_TO(QUAD, TAPS_D);
#if SG_SEPARABLE_U
    acc* const filtered = in;  // `in` is no longer needed
    acc* const wide = in + LARGER(in_accs, filtered_accs);
    acc* const end = wide + all_inputs * WIDE_P;
#else
    acc* const filtered = in + in_accs;
    acc* const wide = nullptr;
    acc* const end = filtered + filtered_accs;
#endif
    read_taps(p, up, down);
    const unsigned_t total = tiles_of(p);
    for (unsigned_t work = blockIdx.x; work < total; work += gridDim.x) {
        const tile_t tile = tile_of(p, work);
        const int blocks = BLOCKS(tile.rows), inputs = EARLY + blocks * INPUTS;
        if (work != blockIdx.x) __syncthreads();  // the previous tile is finished
        stage(p, tile, inputs, in);
#if SG_MODE == SG_GATE
        read_mask(p, tile, blocks * SG_PERIOD, reinterpret_cast<bits_t*>(end));
#endif
        __syncthreads();
#if SG_SEPARABLE_U
        filter_rows(up, in, inputs, wide);
        __syncthreads();
#endif
        // Whole warps, for ballots.
        if (static_cast<int>(threadIdx.x) / 32 * 32 < GRID_W(tile.columns)) {
            activation_t activate(p, tile, end);
            upsampled_t upsampled(up, in, wide);
            filtered_t to(down, filtered);
UNROLL
            for (int i = 0; i < EARLY; ++i) upsampled.take(i - EARLY);
#if SG_UNROLL
#pragma unroll 2  // halves the loop overhead
#else
#pragma unroll 1
#endif
            for (int b = 0; b < blocks; ++b) {
UNROLL
                for (int i = 0; i < INPUTS; ++i) upsampled.take(i);
UNROLL
                for (int s = 0; s < SG_PERIOD; ++s) to.take(activate(upsampled.rows[s], s), s);
                activate.next_block();
                upsampled.next_block();
                to.next_block(b, tile.rows);
            }
        }
        __syncthreads();
        const acc sum = write_outputs(p, tile, down, filtered);
#if SG_MODE == SG_GATE
        if (p.sums) write_sum<THREADS>(sum, end, static_cast<acc*>(p.sums) + work);
#endif
        (void)sum;
#if SG_MODE == SG_RECORD
        write_mask(p, tile, reinterpret_cast<const bits_t*>(end));
#endif
    }
}
