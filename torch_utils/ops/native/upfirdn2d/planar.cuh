// Planar images and those of any strides: a block computes a tile of one image plane. Part of upfirdn2d.cu.

#define THREAD_ROWS (SG_THREADS / SG_LANES)
#define TILE_W (SG_LANES * SG_COLUMNS)
#define TILE_H (THREAD_ROWS * SG_ROWS)
#define READS_X UP_TO(WIDEST(ADVANCE_X), SG_SHIFT + NEEDS_X)
#define STAGED_W UP_TO(SG_LOAD, (SG_LANES - 1) * ADVANCE_X + SG_SHIFT + NEEDS_X)
#define STAGED_H ((THREAD_ROWS - 1) * ADVANCE_Y + NEEDS_Y)
#define READ_W ((SG_LANES - 1) * ADVANCE_X + READS_X)
#define PITCH UP_TO(QUAD, READ_W > STAGED_W ? READ_W : STAGED_W)
#define ROW_PITCH UP_TO(QUAD, TILE_W)
#define TILE_ACCS (STAGED_H * PITCH)
#define ROW_ACCS (SG_SEPARABLE ? STAGED_H * ROW_PITCH : 0)
#define REGROUPS (SG_STORE == 1 && SG_COLUMNS > 1)  // redistribute rows so that adjacent lanes write adjacent outputs
static_assert(
    (TILE_ACCS + ROW_ACCS + TAPS) * sizeof(acc) + (REGROUPS ? 2 * SG_THREADS * SG_COLUMNS * sizeof(scalar) : 0) ==
        SG_SHARED_BYTES, "the plan counts shared memory otherwise");

// ---- Inputs

// Number of lanes that load a row: the one that leaves the fewest lanes idle.
__device__ __forceinline__ constexpr int idle(int units, int lanes) { return UP_TO(lanes, units) - units; }
__device__ __forceinline__ constexpr int best_span(int units) {
    return idle(units, 32) <= idle(units, 16) ? 32 : SG_LOAD == 1 || idle(units, 16) <= idle(units, 8) ? 16 : 8;
}

// Load the part of a plane that begins at (ix0, iy0), zero outside the image, with many loads in flight.
__device__ __forceinline__ void stage(const sg_upfirdn2d_params& p, const scalar* x, int ix0, int iy0, acc* tile) {
    typedef elements<SG_LOAD> unit;
    constexpr int units = STAGED_W / SG_LOAD, span = best_span(units), passes = (units + span - 1) / span;
    constexpr int step = SG_THREADS / span, rounds = (STAGED_H + step - 1) / step;
    constexpr int fitting = passes < 20 ? 20 / passes : 1, together = fitting < rounds ? fitting : rounds;
    const offset_t stride_y = static_cast<offset_t>(p.x_stride[2]);
    const offset_t stride_x = SG_DENSE ? 1 : static_cast<offset_t>(p.x_stride[3]);
    const int side = static_cast<int>(threadIdx.x) % span * SG_LOAD;
    for (int row0 = threadIdx.x / span; row0 < STAGED_H; row0 += step * together) {
        unit fetched[together][passes];
#pragma unroll
        for (int t = 0; t < together; ++t) {
            const int row = row0 + t * step, iy = iy0 + row;
            const bool there = row < STAGED_H && in_range(iy, p.in_h);
            const scalar* const from = x + iy * stride_y;  // dereferenced only inside the image
#pragma unroll
            for (int q = 0; q < passes; ++q) {
                const int column = side + q * span * SG_LOAD, ix = ix0 + column;
                fetched[t][q] = unit{};
                if (there && column < STAGED_W && in_range(ix, p.in_w))
                    fetched[t][q] = read<SG_LOAD>(from + ix * stride_x);
            }
        }
#pragma unroll
        for (int t = 0; t < together; ++t) {
            const int row = row0 + t * step;
#pragma unroll
            for (int q = 0; q < passes; ++q) {
                const int column = side + q * span * SG_LOAD;
                vec<acc, SG_LOAD> values;
                fetched[t][q].unpack(values.v);
                if (row < STAGED_H && column < STAGED_W)
                    *reinterpret_cast<vec<acc, SG_LOAD>*>(tile + row * PITCH + column) = values;
            }
        }
    }
}

// ---- Outputs

struct place {
    scalar* first;      // of this thread's outputs; with REGROUPS, of its row of threads
    scalar* regroup;    // two rows of outputs, used alternately
    int columns, rows;  // remaining in the image
    int lane;
};

// Write row j of a thread's outputs.
__device__ __forceinline__ void put(const sg_upfirdn2d_params& p, const place& at, int j, const acc* sums) {
    const offset_t stride_x = SG_DENSE ? 1 : static_cast<offset_t>(p.y_stride[3]);
    scalar* const row = at.first + j * static_cast<offset_t>(p.y_stride[2]);
#if REGROUPS
    scalar* const mine = at.regroup + (j & 1) * SG_THREADS * SG_COLUMNS;
#pragma unroll
    for (int c = 0; c < SG_COLUMNS; ++c) mine[at.lane * SG_COLUMNS + c] = from_acc<scalar>(sums[c]);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < SG_COLUMNS; ++c) {
        const int column = at.lane + c * SG_LANES;
        if (j < at.rows && column < at.columns) row[column * stride_x] = mine[column];
    }
#else
#pragma unroll
    for (int c = 0; c < SG_COLUMNS; c += SG_STORE)
        if (j < at.rows && c < at.columns) write<SG_STORE>(row + c * stride_x, sums + c);
#endif
}

// ---- Filters

// Add the contributions of a row of inputs to a row of outputs, with the taps of one row.
__device__ __forceinline__ void filter_x(const acc* taps, const acc* in, acc* sums) {
UNROLL
    for (int c = 0; c < SG_COLUMNS; ++c) {
UNROLL
        for (int t = 0; t < (SG_TAPS_X + SG_UP_X - 1) / SG_UP_X; ++t) {
            const int i = (c * SG_DOWN_X - SG_PHASE_X + SG_UP_X - 1) / SG_UP_X + t, k = tap_x(i, c);
            if (in_range(k, SG_TAPS_X)) sums[c] += taps[k] * in[SG_SHIFT + i];
        }
    }
}

#if SG_SEPARABLE
// Filter the rows of the tile along x.
__device__ __forceinline__ void filter_rows(const acc* taps, const acc* tile, acc* rows) {
    for (int i = threadIdx.x; i < STAGED_H * SG_LANES; i += SG_THREADS) {
        const int row = i / SG_LANES, lane = i % SG_LANES;
        const acc* const from = tile + row * PITCH + lane * ADVANCE_X;
        acc sums[SG_COLUMNS] = {};
#if SG_UNROLL
        acc in[READS_X];
        read_shared<READS_X, WIDEST(ADVANCE_X)>(from, in);
#else
        const acc* const in = from;
#endif
        filter_x(taps, in, sums);
#pragma unroll
        for (int c = 0; c < SG_COLUMNS; ++c) rows[row * ROW_PITCH + lane * SG_COLUMNS + c] = sums[c];
    }
}
#endif

// Compute and write a thread's outputs; `from`: its first input (separable: its rows, filtered along x).
__device__ __forceinline__ void filter(
    const sg_upfirdn2d_params& p, const acc* taps, const acc* from, const place& at) {
    acc sums[SG_ROWS][SG_COLUMNS] = {};
UNROLL
    for (int r = 0; r < NEEDS_Y; ++r) {
#if SG_SEPARABLE
        acc in[SG_COLUMNS];
        read_shared<SG_COLUMNS, WIDEST(SG_COLUMNS)>(from + r * ROW_PITCH, in);
#elif SG_UNROLL
        acc in[READS_X];
        read_shared<READS_X, WIDEST(ADVANCE_X)>(from + r * PITCH, in);
#else
        const acc* const in = from + r * PITCH;
#endif
UNROLL
        for (int j = 0; j < SG_ROWS; ++j) {
            const int k = tap_y(r, j);
            if (in_range(k, SG_TAPS_Y)) {
#if SG_SEPARABLE
                const acc tap = taps[SG_TAPS_X + k];
#pragma unroll
                for (int c = 0; c < SG_COLUMNS; ++c) sums[j][c] += tap * in[c];
#else
                filter_x(taps + k * SG_TAPS_X, in, sums[j]);
#endif
            }
            if (last_y(j) == r) put(p, at, j, sums[j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(SG_THREADS) sg_upfirdn2d_cuda(const sg_upfirdn2d_params p) {
    SG_SHARED_MEMORY;
    acc* const tile = reinterpret_cast<acc*>(sg_shared_memory);
    acc* const rows = tile + TILE_ACCS;
    acc* const shared_taps = rows + ROW_ACCS;
    const int lane = static_cast<int>(threadIdx.x % SG_LANES), thread_row = static_cast<int>(threadIdx.x / SG_LANES);
    const int before = REGROUPS ? 0 : lane * SG_COLUMNS;
    place at;
    at.lane = lane;
    at.regroup = reinterpret_cast<scalar*>(shared_taps + TAPS) + thread_row * TILE_W;
    const acc tap = first_tap(p);
    const unsigned tiles_x = (p.out_w + TILE_W - 1) / TILE_W, tiles_y = (p.out_h + TILE_H - 1) / TILE_H;
    const unsigned_t total = static_cast<unsigned_t>(p.n) * p.c * tiles_x * tiles_y;
    for (unsigned_t work = blockIdx.x; work < total; work += gridDim.x) {
        const int x0 = static_cast<int>(work % tiles_x) * TILE_W;
        const int y0 = static_cast<int>(work / tiles_x % tiles_y) * TILE_H;
        const unsigned_t plane = work / tiles_x / tiles_y;
        const offset_t n = static_cast<offset_t>(plane / p.c), c = static_cast<offset_t>(plane % p.c);
        const scalar* const x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) +
                                c * static_cast<offset_t>(p.x_stride[1]);
        const int y_first = y0 + thread_row * SG_ROWS, x_first = x0 + before;
        at.rows = p.out_h - y_first, at.columns = p.out_w - x_first;
        at.first = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) +
                   c * static_cast<offset_t>(p.y_stride[1]) + y_first * static_cast<offset_t>(p.y_stride[2]) +
                   x_first * (SG_DENSE ? 1 : static_cast<offset_t>(p.y_stride[3]));
        if (work != blockIdx.x) __syncthreads();  // the previous tile is finished
        stage(p, x, first_x(x0, p.pad_x0) - SG_SHIFT, first_y(y0, p.pad_y0), tile);
        if (work == blockIdx.x) keep_taps(p, tap, shared_taps);
        __syncthreads();
#if KEEPS_TAPS
        acc taps[TAPS];
#pragma unroll
        for (int k = 0; k < TAPS; ++k) taps[k] = shared_taps[k];
#else
        const acc* const taps = shared_taps;
#endif
#if SG_SEPARABLE
        filter_rows(taps, tile, rows);
        __syncthreads();
        filter(p, taps, rows + thread_row * ADVANCE_Y * ROW_PITCH + lane * SG_COLUMNS, at);
#else
        filter(p, taps, tile + thread_row * ADVANCE_Y * PITCH + lane * ADVANCE_X, at);
#endif
    }
}
