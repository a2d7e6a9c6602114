// Channels-last images: a thread computes some channels of a block of pixels. Part of upfirdn2d.cu.

#define THREAD_COLUMNS (SG_THREADS / SG_LANES)
#define TILE_W (THREAD_COLUMNS * SG_COLUMNS)
static_assert(TAPS * sizeof(acc) == SG_SHARED_BYTES, "the plan counts shared memory otherwise");

// Channels of one thread's outputs: a pixel, or a row of pixels.
struct sums_t {
    acc v[SG_VECTOR];
};

__device__ __forceinline__ void add(sums_t& sum, acc tap, const sums_t& in) {
#pragma unroll
    for (int v = 0; v < SG_VECTOR; ++v) sum.v[v] += tap * in.v[v];
}

__device__ __forceinline__ void filter_x(const acc* taps, const sums_t* in, sums_t* sums) {
#pragma unroll
    for (int c = 0; c < SG_COLUMNS; ++c) {
#pragma unroll
        for (int t = 0; t < (SG_TAPS_X + SG_UP_X - 1) / SG_UP_X; ++t) {
            const int i = (c * SG_DOWN_X - SG_PHASE_X + SG_UP_X - 1) / SG_UP_X + t, k = tap_x(i, c);
            if (in_range(k, SG_TAPS_X)) add(sums[c], taps[k], in[i]);
        }
    }
}

// Position of a thread's first inputs and outputs, and the number of them from there on.
struct block_t {
    const scalar* x;
    scalar* y;
    int ix, iy, columns, rows;
};

// Compute and write a thread's outputs. PRODUCT: the taps are those along x, then those along y; else [y][x].
template <bool PRODUCT>
__device__ __forceinline__ void filter(const sg_upfirdn2d_params& p, const acc* taps, const block_t& block) {
    const offset_t x_down = static_cast<offset_t>(p.x_stride[2]), x_right = static_cast<offset_t>(p.x_stride[3]);
    const offset_t y_down = static_cast<offset_t>(p.y_stride[2]), y_right = static_cast<offset_t>(p.y_stride[3]);
    bool has_column[NEEDS_X];
#pragma unroll
    for (int i = 0; i < NEEDS_X; ++i) has_column[i] = in_range(block.ix + i, p.in_w);
    sums_t sums[SG_ROWS][SG_COLUMNS] = {};
    const scalar* row = block.x;
#pragma unroll
    for (int r = 0; r < NEEDS_Y; ++r, row += x_down) {
        const bool has_row = in_range(block.iy + r, p.in_h);
        elements<SG_VECTOR> fetched[NEEDS_X];
#pragma unroll
        for (int i = 0; i < NEEDS_X; ++i) fetched[i] = read_if<SG_VECTOR>(has_row && has_column[i], row + i * x_right);
        sums_t in[NEEDS_X];
#pragma unroll
        for (int i = 0; i < NEEDS_X; ++i) fetched[i].unpack(in[i].v);
        sums_t filtered[SG_COLUMNS] = {};
        if (PRODUCT) filter_x(taps, in, filtered);
#pragma unroll
        for (int j = 0; j < SG_ROWS; ++j) {
            const int k = tap_y(r, j);
            if (in_range(k, SG_TAPS_Y)) {
                if (PRODUCT) {
#pragma unroll
                    for (int c = 0; c < SG_COLUMNS; ++c) add(sums[j][c], taps[SG_TAPS_X + k], filtered[c]);
                } else {
                    filter_x(taps + k * SG_TAPS_X, in, sums[j]);
                }
            }
            if (last_y(j) != r || j >= block.rows) continue;
#pragma unroll
            for (int c = 0; c < SG_COLUMNS; ++c)
                if (c < block.columns) write<SG_VECTOR>(block.y + j * y_down + c * y_right, sums[j][c].v);
        }
    }
}

#if SG_FACTORS
static_assert(SG_UP_X == 1 && SG_UP_Y == 1 && SG_DOWN_X == 1 && SG_DOWN_Y == 1 && TAPS <= 32, "of one pixel to one");

// Return whether the filter is separable up to rounding, and write its factors to `factors`, along x and then along y.
// StyleGAN2's filter is separable, stored as [4, 4] taps: two short passes take half the multiplications. Each lane of
// a warp checks one tap.
__device__ __forceinline__ bool factor(const acc* taps, acc* factors) {
    const acc* const row = taps + SG_TAPS_Y / 2 * SG_TAPS_X;
    const acc pivot = row[SG_TAPS_X / 2];
    const int k = static_cast<int>(threadIdx.x % 32), at = k < TAPS ? k : 0;
    const acc tap = taps[at], column = taps[at / SG_TAPS_X * SG_TAPS_X + SG_TAPS_X / 2] / pivot;
    const acc error = column * row[at % SG_TAPS_X] - tap;
    const acc most = (tap < acc(0) ? -tap : tap) * acc(sizeof(acc) == 4 ? 1.2e-7 : 2.3e-16);
#pragma unroll
    for (int i = 0; i < SG_TAPS_X; ++i) factors[i] = row[i];
#pragma unroll
    for (int i = 0; i < SG_TAPS_Y; ++i) factors[SG_TAPS_X + i] = taps[i * SG_TAPS_X + SG_TAPS_X / 2] / pivot;
    return __ballot_sync(0xffffffffu, !(error <= most && error >= -most)) == 0;  // false for NaN
}

// Compute outputs one by one, for the rare non-separable filter: small code, not fast.
__device__ __forceinline__ void filter_plainly(const sg_upfirdn2d_params& p, const acc* taps, const block_t& block) {
    const offset_t x_down = static_cast<offset_t>(p.x_stride[2]), x_right = static_cast<offset_t>(p.x_stride[3]);
    const offset_t y_down = static_cast<offset_t>(p.y_stride[2]), y_right = static_cast<offset_t>(p.y_stride[3]);
#pragma unroll 1
    for (int i = 0; i < SG_ROWS * SG_COLUMNS; ++i) {
        const int j = i / SG_COLUMNS, c = i % SG_COLUMNS;
        if (j >= block.rows || c >= block.columns) continue;
        sums_t sum = {}, in;
#pragma unroll 1
        for (int k = 0; k < TAPS; ++k) {
            const int r = j + k / SG_TAPS_X, at = c + k % SG_TAPS_X;
            const bool exists = in_range(block.iy + r, p.in_h) && in_range(block.ix + at, p.in_w);
            read_if<SG_VECTOR>(exists, block.x + r * x_down + at * x_right).unpack(in.v);
            add(sum, taps[k], in);
        }
        write<SG_VECTOR>(block.y + j * y_down + c * y_right, sum.v);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(SG_THREADS) sg_upfirdn2d_cuda(const sg_upfirdn2d_params p) {
    SG_SHARED_MEMORY;
    acc* const shared_taps = reinterpret_cast<acc*>(sg_shared_memory);
    keep_taps(p, first_tap(p), shared_taps);
    __syncthreads();
#if SG_FACTORS
    acc factors[SG_TAPS_X + SG_TAPS_Y];
    const bool is_product = factor(shared_taps, factors);
#elif KEEPS_TAPS
    acc taps[TAPS];
#pragma unroll
    for (int k = 0; k < TAPS; ++k) taps[k] = shared_taps[k];
#else
    const acc* const taps = shared_taps;
#endif
    const int lane = static_cast<int>(threadIdx.x % SG_LANES), column = static_cast<int>(threadIdx.x / SG_LANES);
    const unsigned groups = (p.c / SG_VECTOR + SG_LANES - 1) / SG_LANES;
    const unsigned tiles_x = (p.out_w + TILE_W - 1) / TILE_W, tiles_y = (p.out_h + SG_ROWS - 1) / SG_ROWS;
    const unsigned_t total = static_cast<unsigned_t>(p.n) * groups * tiles_x * tiles_y;
    for (unsigned_t work = blockIdx.x; work < total; work += gridDim.x) {
        const int channel = (static_cast<int>(work % groups) * SG_LANES + lane) * SG_VECTOR;
        const unsigned_t pixels = work / groups;
        const int ox = (static_cast<int>(pixels % tiles_x) * THREAD_COLUMNS + column) * SG_COLUMNS;
        const int oy = static_cast<int>(pixels / tiles_x % tiles_y) * SG_ROWS;
        const offset_t n = static_cast<offset_t>(pixels / tiles_x / tiles_y);
        if (column >= THREAD_COLUMNS || channel >= p.c || ox >= p.out_w) continue;
        block_t block;
        block.ix = first_x(ox, p.pad_x0), block.iy = first_y(oy, p.pad_y0);
        block.columns = p.out_w - ox, block.rows = p.out_h - oy;
        block.x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) + channel +
                  block.iy * static_cast<offset_t>(p.x_stride[2]) + block.ix * static_cast<offset_t>(p.x_stride[3]);
        block.y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) + channel +
                  oy * static_cast<offset_t>(p.y_stride[2]) + ox * static_cast<offset_t>(p.y_stride[3]);
#if SG_FACTORS
        if (is_product) filter<true>(p, factors, block);
        else filter_plainly(p, shared_taps, block);
#else
        filter<SG_SEPARABLE>(p, taps, block);
#endif
    }
}
