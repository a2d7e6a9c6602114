// Channels-last images: a thread has some channels of a block of pixels. Part of upfirdn2d.cu.

#define THREAD_COLUMNS (SG_THREADS / SG_LANES)
#define TILE_W (THREAD_COLUMNS * SG_COLUMNS)
static_assert(TAPS * sizeof(acc) == SG_SHARED_BYTES, "the plan counts shared memory otherwise");

typedef several<scalar, SG_VECTOR> channels;

// Some channels of one thread's outputs: a pixel, or a row of pixels.
struct sums_t {
    acc v[SG_VECTOR];
};

__device__ __forceinline__ void add(sums_t& sum, acc tap, const sums_t& in) {
#pragma unroll
    for (int v = 0; v < SG_VECTOR; ++v) sum.v[v] += tap * in.v[v];
}

__device__ __forceinline__ void filter_x(const acc* taps, const sums_t* in, sums_t* sums) {
UNROLL
    for (int c = 0; c < SG_COLUMNS; ++c) {
UNROLL
        for (int t = 0; t < (SG_TAPS_X + SG_UP_X - 1) / SG_UP_X; ++t) {
            const int i = (c * SG_DOWN_X - SG_PHASE_X + SG_UP_X - 1) / SG_UP_X + t, k = tap_x(i, c);
            if (exists(k, SG_TAPS_X)) add(sums[c], taps[k], in[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(SG_THREADS) sg_upfirdn2d_cuda(const sg_upfirdn2d_params p) {
    SG_SHARED_MEMORY;
    acc* const shared_taps = reinterpret_cast<acc*>(sg_shared_memory);
    keep_taps(p, first_tap(p), shared_taps);
    __syncthreads();
#if KEEPS_TAPS
    acc taps[TAPS];
#pragma unroll
    for (int k = 0; k < TAPS; ++k) taps[k] = shared_taps[k];
#else
    const acc* const taps = shared_taps;
#endif
    const int lane = static_cast<int>(threadIdx.x % SG_LANES), column = static_cast<int>(threadIdx.x / SG_LANES);
    const unsigned groups = (p.c / SG_VECTOR + SG_LANES - 1) / SG_LANES;
    const unsigned tiles_x = (p.out_w + TILE_W - 1) / TILE_W, tiles_y = (p.out_h + SG_ROWS - 1) / SG_ROWS;
    const count_t total = static_cast<count_t>(p.n) * groups * tiles_x * tiles_y;
    const offset_t x_down = static_cast<offset_t>(p.x_stride[2]), x_right = static_cast<offset_t>(p.x_stride[3]);
    const offset_t y_down = static_cast<offset_t>(p.y_stride[2]), y_right = static_cast<offset_t>(p.y_stride[3]);
    for (count_t work = blockIdx.x; work < total; work += gridDim.x) {
        const int channel = (static_cast<int>(work % groups) * SG_LANES + lane) * SG_VECTOR;
        const count_t pixels = work / groups;
        const int ox = (static_cast<int>(pixels % tiles_x) * THREAD_COLUMNS + column) * SG_COLUMNS;
        const int oy = static_cast<int>(pixels / tiles_x % tiles_y) * SG_ROWS;
        const offset_t n = static_cast<offset_t>(pixels / tiles_x / tiles_y);
        if (column >= THREAD_COLUMNS || channel >= p.c || ox >= p.out_w) continue;
        const int ix = first_x(ox, p.pad_x0), iy = first_y(oy, p.pad_y0);
        const scalar* const x = static_cast<const scalar*>(p.x) + n * static_cast<offset_t>(p.x_stride[0]) + channel;
        scalar* const y = static_cast<scalar*>(p.y) + n * static_cast<offset_t>(p.y_stride[0]) + channel;
        sums_t sums[SG_ROWS][SG_COLUMNS] = {};
#pragma unroll
        for (int r = 0; r < NEEDS_Y; ++r) {
            const bool there = within(iy + r, p.in_h);
            const scalar* const row = x + (iy + r) * x_down;  // looked at only if there
            sums_t in[NEEDS_X];
#pragma unroll
            for (int i = 0; i < NEEDS_X; ++i) {
                channels found = {};
                if (there && within(ix + i, p.in_w))
                    found = *reinterpret_cast<const channels*>(row + (ix + i) * x_right);
#pragma unroll
                for (int v = 0; v < SG_VECTOR; ++v) in[i].v[v] = to_acc(found.v[v]);
            }
#if SG_SEPARABLE
            sums_t filtered[SG_COLUMNS] = {};
            filter_x(taps, in, filtered);
#endif
#pragma unroll
            for (int j = 0; j < SG_ROWS; ++j) {
                const int k = tap_y(r, j);
                if (exists(k, SG_TAPS_Y)) {
#if SG_SEPARABLE
#pragma unroll
                    for (int c = 0; c < SG_COLUMNS; ++c) add(sums[j][c], taps[SG_TAPS_X + k], filtered[c]);
#else
                    filter_x(taps + k * SG_TAPS_X, in, sums[j]);
#endif
                }
                if (last_y(j) != r || oy + j >= p.out_h) continue;
#pragma unroll
                for (int c = 0; c < SG_COLUMNS; ++c) {
                    channels out;
#pragma unroll
                    for (int v = 0; v < SG_VECTOR; ++v) out.v[v] = from_acc<scalar>(sums[j][c].v[v]);
                    if (ox + c < p.out_w)
                        *reinterpret_cast<channels*>(y + (oy + j) * y_down + (ox + c) * y_right) = out;
                }
            }
        }
    }
}
