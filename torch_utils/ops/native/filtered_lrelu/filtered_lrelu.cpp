// filtered_lrelu on the CPU: strips of rows that fit into the cache, polyphase filters, whole vectors throughout.
//
// One task is a strip of output rows of one (sample, channel). It reads its input rows once (bias, zero padding,
// columns split into planes), filters along x, and then processes each column of vectors: upsampling along y,
// activation and downsampling along y are done in registers, so the upsampled image is never in memory. Non-separable
// filters need neighbors along x, and read the activated rows of the strip from a buffer.
#include "filtered_lrelu.h"

#include <atomic>
#include <new>

#include "../parallel.h"
#include "activation.h"
#include "geometry.h"

namespace sg {
namespace {

const int BLOCK = 8;  // rows computed together for non-separable filters
const sg_int64 STRIP_BYTES = 384 * 1024;  // limit of a strip, to stay in the L2 cache

// Buffers of one strip, in scratch memory of its thread.
template <class T>
struct Strip {
    int first, last;            // output rows [first, last)
    int grid_first, grid_last;  // rows of the grid needed for them
    int owned_first, owned_last;
    int input_first;            // the input row of rows[0]
    T* zeros;                   // an input row outside the image
    T* input;                   // one row, or all rows if fu is 2-D
    T* wide;                    // rows filtered along x
    T* grid;                    // activated rows, if they are stored
    T* tall;                    // rows filtered along y
    const T** rows;             // of `wide` or `input`, by input row - input_first
};

template <class T>
bool fused(const Geometry<T>& g);

template <class T>
int strip_input_rows(const Geometry<T>& g, int rows) {
    return (rows * g.down + g.taps_dy + 2 * g.planes) / g.up + g.steps_y + BLOCK;
}

// Blocks of BLOCK rows may read beyond the last row, without effect.
template <class T>
sg_int64 strip_grid_rows(const Geometry<T>& g, int rows) {
    return fused(g) ? 0 : static_cast<sg_int64>(rows + BLOCK) * g.down + g.taps_dy;
}

template <class T>
sg_int64 strip_bytes(const Geometry<T>& g, int rows) {
    sg_int64 inputs = strip_input_rows(g, rows), cells = g.input_row_width + g.row_width;
    cells += g.separable_u ? g.input_row_width + inputs * g.row_width : inputs * g.input_row_width;
    cells += strip_grid_rows(g, rows) * g.row_width;
    cells += (fused(g) ? rows + 1 : 1) * static_cast<sg_int64>(g.row_width);
    return cells * static_cast<sg_int64>(sizeof(T)) + inputs * static_cast<sg_int64>(sizeof(T*)) + 512;
}

template <class T>
int strip_rows(const Geometry<T>& g, sg_int64 image_planes, int num_threads) {
    int unit = g.planes / g.down;  // strips begin at a multiple of the pattern of rows
    int rows = ceil_div(g.p->out_h, unit) * unit;
    while (rows > 8 * unit && (strip_bytes(g, rows) > STRIP_BYTES ||
                               (num_threads > 1 && image_planes * ceil_div(g.p->out_h, rows) < 2 * num_threads)))
        rows = ceil_div(ceil_div(rows, 2), unit) * unit;
    return rows;
}

template <class T>
bool allocate(const Geometry<T>& g, int rows, Strip<T>& s) {
    unsigned char* memory = static_cast<unsigned char*>(scratch(static_cast<size_t>(strip_bytes(g, rows)) + 64 * 8));
    if (!memory) return false;
    auto take = [&memory](sg_int64 bytes) {
        unsigned char* start = memory;
        memory += (bytes + 63) / 64 * 64;
        return start;
    };
    auto row_of = [&take](sg_int64 count, sg_int64 width) {
        return reinterpret_cast<T*>(take(count * width * static_cast<sg_int64>(sizeof(T))));
    };
    sg_int64 inputs = strip_input_rows(g, rows);
    s.zeros = row_of(1, std::max(g.row_width, g.input_row_width));
    std::fill_n(s.zeros, std::max(g.row_width, g.input_row_width), T(0));
    s.input = row_of(g.separable_u ? 1 : inputs, g.input_row_width);
    s.wide = g.separable_u ? row_of(inputs, g.row_width) : nullptr;
    s.grid = row_of(strip_grid_rows(g, rows), g.row_width);
    s.tall = row_of(fused(g) ? rows + 1 : 1, g.row_width);
    s.rows = reinterpret_cast<const T**>(take(inputs * static_cast<sg_int64>(sizeof(T*))));
    return true;
}

// ---- Along x

template <class T>
void read_row(const Geometry<T>& g, const T* x, T bias, T* to) {
    for (int r = 0; r < g.input_planes; ++r) {
        T* plane = to + static_cast<sg_int64>(r) * g.input_width;
        // Columns column * input_planes + r of the image, those outside are zero.
        const int begin = std::min(std::max(-g.input_first, 0), g.input_width);
        int end = floor_div(g.p->in_w - 1 - r, g.input_planes) + 1 - g.input_first;
        end = std::max(std::min(end, g.input_width), begin);
        std::fill_n(plane, begin, T(0));
        const T* from = x + static_cast<sg_int64>(g.input_first) * g.input_planes + r;
        if (g.input_planes == 1)
            for (int i = begin; i < end; ++i) plane[i] = from[i] + bias;
        else
            for (int i = begin; i < end; ++i) plane[i] = from[static_cast<sg_int64>(i) * g.input_planes] + bias;
        std::fill_n(plane + end, g.input_width - end, T(0));
    }
    T* rest = to + static_cast<sg_int64>(g.input_planes) * g.input_width;
    std::fill_n(rest, to + g.input_row_width - rest, T(0));
}

// sum over steps of taps[t] * from[offsets[t] + i], for `width` numbers, a multiple of the lanes.
template <class T, int STEPS>
void filter_row(const T* from, const int* offsets, const T* taps, int steps, int width, T* to) {
    constexpr int lanes = simd<T>::lanes;
    const int count = STEPS ? STEPS : steps;
    for (int i = 0; i < width; i += lanes) {
        vector_of<T> sum = taps[0] * load(from + offsets[0] + i);
#pragma GCC unroll 12
        for (int t = 1; t < count; ++t) sum += taps[t] * load(from + offsets[t] + i);
        store(to + i, sum);
    }
}

template <class T>
void filter_row(const T* from, const int* offsets, const T* taps, int steps, int width, T* to) {
    switch (steps) {
        case 6: return filter_row<T, 6>(from, offsets, taps, steps, width, to);
        case 12: return filter_row<T, 12>(from, offsets, taps, steps, width, to);
        case 24: return filter_row<T, 24>(from, offsets, taps, steps, width, to);
        default: return filter_row<T, 0>(from, offsets, taps, steps, width, to);
    }
}

// Compute one row of outputs, which is split into output planes.
template <class T>
void write_row(const Geometry<T>& g, const T* from, T* spare, T* y) {
    constexpr int lanes = simd<T>::lanes;
    for (int r = 0; r < g.output_planes; ++r) {
        const int* offsets = g.output_offset.data() + r * g.taps_dx;
        int count = floor_div(g.p->out_w - 1 - r, g.output_planes) + 1, whole = count / lanes * lanes;
        T* to = g.output_planes == 1 ? y : spare;
        filter_row(from, offsets, g.down_x.data(), g.taps_dx, whole, to);
        if (whole < count) {
            T tail[lanes];
            vector_of<T> sum{};
            for (int k = 0; k < g.taps_dx; ++k) sum += g.down_x[k] * load(from + offsets[k] + whole);
            store(tail, sum);
            std::memcpy(to + whole, tail, static_cast<size_t>(count - whole) * sizeof(T));
        }
        if (g.output_planes > 1)
            for (int i = 0; i < count; ++i) y[static_cast<sg_int64>(i) * g.output_planes + r] = spare[i];
    }
}

// ---- Along y, column by column of vectors

// Upsampling, activation and, unless the rows are KEPT, downsampling, all in registers. SHIFT is row_shift of the
// geometry, a template argument so that the pattern of taps is a compile-time constant.
template <class T, int UP, int DOWN, int STEPS, int TAPS, int SHIFT, bool KEPT, int MODE>
void walk(const Geometry<T>& g, const Strip<T>& s, sg_int64 plane) {
    constexpr int lanes = simd<T>::lanes;
    constexpr int period = KEPT ? UP : std::lcm(UP, DOWN);
    constexpr int pending = KEPT ? 1 : TAPS / DOWN;  // output rows that one row of the grid adds to
    Activation<T, MODE> activate(g, plane);
    T up_taps[UP * STEPS], down_taps[TAPS];
    std::copy_n(g.up_y.data(), UP * STEPS, up_taps);
    if (!KEPT) std::copy_n(g.down_y.data(), TAPS, down_taps);
    const int start = floor_div(s.grid_first - SHIFT, period) * period;
    for (int index = 0; index < g.vectors(); ++index) {
        const sg_int64 at = static_cast<sg_int64>(index) * lanes;
        activate.take_column(index);
        vector_of<T> above[STEPS], sums[pending];
        const T* const* rows = s.rows + (start / UP + g.first_row - s.input_first);
#pragma GCC unroll 16
        for (int t = 0; t + 1 < STEPS; ++t) above[t + 1] = load(*rows++ + at);
#pragma GCC unroll 16
        for (int a = 0; a < pending; ++a) sums[a] = vector_of<T>{};
        for (int m0 = start + SHIFT; m0 < s.grid_last; m0 += period) {
#pragma GCC unroll 8
            for (int r = 0; r < period; ++r) {
                if (r % UP == 0) {
#pragma GCC unroll 16
                    for (int t = 0; t + 1 < STEPS; ++t) above[t] = above[t + 1];
                    above[STEPS - 1] = load(*rows++ + at);
                }
                vector_of<T> u = up_taps[r % UP * STEPS] * above[0];
#pragma GCC unroll 16
                for (int t = 1; t < STEPS; ++t) u += up_taps[r % UP * STEPS + t] * above[t];
                const int m = m0 + r;
                vector_of<T> v = activate(u, m, m >= s.owned_first && m < s.owned_last);
                if (KEPT) {
                    if (m >= s.grid_first && m < s.grid_last)
                        store(s.grid + static_cast<sg_int64>(m - s.grid_first) * g.row_width + at, v);
                    continue;
                }
                const int k = (SHIFT + r) % DOWN;
#pragma GCC unroll 16
                for (int a = 0; a < pending; ++a) sums[a] += down_taps[k + DOWN * (pending - 1 - a)] * v;
                if (k == DOWN - 1) {
                    const int j = floor_div(m + 1, DOWN) - pending;
                    if (j >= s.first && j < s.last)
                        store(s.tall + static_cast<sg_int64>(j - s.first) * g.row_width + at, sums[0]);
#pragma GCC unroll 16
                    for (int a = 0; a + 1 < pending; ++a) sums[a] = sums[a + 1];
                    sums[pending - 1] = vector_of<T>{};
                }
            }
        }
    }
}

// General filters: one row of the grid at a time.
template <class T, int MODE>
void walk_any(const Geometry<T>& g, const Strip<T>& s, sg_int64 plane) {
    constexpr int lanes = simd<T>::lanes;
    Activation<T, MODE> activate(g, plane);
    for (int index = 0; index < g.vectors(); ++index) {
        activate.take_column(index);
        const sg_int64 at = static_cast<sg_int64>(index) * lanes;
        for (int m = s.grid_first; m < s.grid_last; ++m) {
            const int q = floor_div(m - g.row_shift, g.up), r = m - g.row_shift - q * g.up;
            const T* const* rows = s.rows + (q + g.first_row - s.input_first);
            const T* taps = g.up_y.data() + r * g.steps_y;
            vector_of<T> u{};
            for (int t = 0; t < g.steps_y; ++t) u += taps[t] * load(rows[t] + at);
            u = activate(u, m, m >= s.owned_first && m < s.owned_last);
            store(s.grid + static_cast<sg_int64>(m - s.grid_first) * g.row_width + at, u);
        }
    }
}

template <class T, int UP, int DOWN, int STEPS, int TAPS, bool KEPT, int MODE>
void walk_by_shift(const Geometry<T>& g, const Strip<T>& s, sg_int64 plane) {
    switch (g.row_shift) {
        case 0: walk<T, UP, DOWN, STEPS, TAPS, 0, KEPT, MODE>(g, s, plane); break;
        case 1: walk<T, UP, DOWN, STEPS, TAPS, 1, KEPT, MODE>(g, s, plane); break;
        case 2: walk<T, UP, DOWN, STEPS, TAPS, 2 % UP, KEPT, MODE>(g, s, plane); break;  // never reached if UP is 2
        default: walk<T, UP, DOWN, STEPS, TAPS, UP - 1, KEPT, MODE>(g, s, plane); break;
    }
}

// Specializations for the filters of StyleGAN3 (6 taps per pixel on either side), in float32 only: float64 is for
// tests, and every specialization costs compile time.
template <class T>
bool known_up(const Geometry<T>& g) {
    return sizeof(T) == 4 && g.separable_u && g.steps_y == 6 && (g.up == 2 || g.up == 4);
}

template <class T>
bool fused(const Geometry<T>& g) {
    return known_up(g) && g.separable_d && static_cast<int>(g.down_y.size()) == 6 * g.down && g.taps_dy == 6 * g.down &&
           ((g.up == 2 && (g.down == 2 || g.down == 4)) || (g.up == 4 && g.down == 2));
}

template <class T, int MODE>
void filter_columns(const Geometry<T>& g, const Strip<T>& s, sg_int64 plane) {
    if constexpr (sizeof(T) == 4) {
        if (fused(g)) {
            if (g.up == 4) return walk_by_shift<T, 4, 2, 6, 12, false, MODE>(g, s, plane);
            if (g.down == 2) return walk_by_shift<T, 2, 2, 6, 12, false, MODE>(g, s, plane);
            return walk_by_shift<T, 2, 4, 6, 24, false, MODE>(g, s, plane);
        }
        if (known_up(g)) {
            if (g.up == 4) return walk_by_shift<T, 4, 1, 6, 1, true, MODE>(g, s, plane);
            return walk_by_shift<T, 2, 1, 6, 1, true, MODE>(g, s, plane);
        }
    }
    walk_any<T, MODE>(g, s, plane);
}

// ---- Non-separable filters

// Compute rows of the grid from input rows. ROWS rows of one phase share their loads: row q * up + r of ROWS groups.
template <class T, int STEPS, int ROWS, int MODE>
void upsample_2d(const Geometry<T>& g, const Strip<T>& s, sg_int64 plane) {
    constexpr int lanes = simd<T>::lanes;
    const int steps_y = STEPS ? STEPS : g.steps_y, steps_x = STEPS ? STEPS : g.steps_x;
    Activation<T, MODE> activate(g, plane);
    const int first = floor_div(s.grid_first - g.row_shift, g.up);
    for (int index = 0; index < g.vectors(); ++index) {
        activate.take_column(index);
        const int c = index / (g.plane_width / lanes);
        const sg_int64 inside = index % (g.plane_width / lanes) * lanes;
        const int* offsets = g.input_offset.data() + c * steps_x;
        for (int q = first; q * g.up + g.row_shift < s.grid_last; q += ROWS) {
            const T* const* rows = s.rows + (q + g.first_row - s.input_first);
            for (int r = 0; r < g.up; ++r) {
                const T* taps = g.up_2d.data() + static_cast<sg_int64>(c * g.up + r) * steps_x * steps_y;
                vector_of<T> sums[ROWS] = {};
                for (int tx = 0; tx < steps_x; ++tx, taps += steps_y) {
                    const sg_int64 at = offsets[tx] + inside;
                    if (STEPS) {
#pragma GCC unroll 16
                        for (int e = 0; e < STEPS + ROWS - 1; ++e) {
                            vector_of<T> value = load(rows[e] + at);
#pragma GCC unroll 8
                            for (int b = 0; b < ROWS; ++b)
                                if (e - b >= 0 && e - b < STEPS) sums[b] += taps[e - b] * value;
                        }
                    } else {
                        for (int ty = 0; ty < steps_y; ++ty) sums[0] += taps[ty] * load(rows[ty] + at);
                    }
                }
#pragma GCC unroll 8
                for (int b = 0; b < ROWS; ++b) {
                    const int m = (q + b) * g.up + g.row_shift + r;
                    if (m < s.grid_first || m >= s.grid_last) continue;
                    vector_of<T> v = activate(sums[b], m, m >= s.owned_first && m < s.owned_last);
                    store(s.grid + static_cast<sg_int64>(m - s.grid_first) * g.row_width +
                              static_cast<sg_int64>(index) * lanes, v);
                }
            }
        }
    }
}

// Compute output rows from rows of the grid; ROWS of them share their loads. FOLDED: the filter is symmetric along x,
// so columns left and right of its center are added before they are multiplied.
template <class T, int DOWN, int TAPS, int ROWS, bool FOLDED>
void downsample_2d(const Geometry<T>& g, const Strip<T>& s, T* y, T* spare) {
    constexpr int lanes = simd<T>::lanes;
    const int down = DOWN ? DOWN : g.down, taps_y = TAPS ? TAPS : g.taps_dy, taps_x = TAPS ? TAPS : g.taps_dx;
    for (int j = s.first; j < s.last; j += ROWS) {
        const T* grid = s.grid + static_cast<sg_int64>(j * down - s.grid_first) * g.row_width;
        const int there = std::min(ROWS, s.last - j);
        for (int r = 0; r < g.output_planes; ++r) {
            const int* offsets = g.output_offset.data() + r * taps_x;
            const int count = floor_div(g.p->out_w - 1 - r, g.output_planes) + 1;
            for (int i = 0; i < count; i += lanes) {
                vector_of<T> sums[ROWS] = {};
                const T* taps = g.down_2d.data();
                for (int kx = 0; kx < (FOLDED ? taps_x / 2 : taps_x); ++kx, taps += taps_y) {
                    const T* at = grid + offsets[kx] + i;
                    const sg_int64 mirrored = FOLDED ? offsets[taps_x - 1 - kx] - offsets[kx] : 0;
                    if (TAPS) {
#pragma GCC unroll 64
                        for (int e = 0; e < TAPS + (ROWS - 1) * DOWN; ++e, at += g.row_width) {
                            vector_of<T> value = load(at);
                            if (FOLDED) value += load(at + mirrored);
#pragma GCC unroll 8
                            for (int b = 0; b < ROWS; ++b)
                                if (e - b * DOWN >= 0 && e - b * DOWN < TAPS) sums[b] += taps[e - b * DOWN] * value;
                        }
                    } else {
                        for (int ky = 0; ky < taps_y; ++ky, at += g.row_width) sums[0] += taps[ky] * load(at);
                    }
                }
                const sg_int64 some = std::min(lanes, count - i);
                for (int b = 0; b < there; ++b) {
                    T* row = y + (j + b) * g.p->y_stride[2];
                    if (g.output_planes == 1) {
                        store_some(row + i, sums[b], some);
                    } else {
                        store(spare, sums[b]);
                        for (sg_int64 l = 0; l < some; ++l) row[(i + l) * g.output_planes + r] = spare[l];
                    }
                }
            }
        }
    }
}

// ---- One strip, and all of them

template <class T, int MODE>
void run_strip(const Geometry<T>& g, Strip<T>& s, const T* x, T bias, T* y, sg_int64 plane) {
    const sg_filtered_lrelu_params& p = *g.p;
    s.grid_first = s.first * g.down;
    s.grid_last = std::min((s.last - 1) * g.down + g.taps_dy, g.grid_h);
    s.owned_first = s.grid_first;
    s.owned_last = s.last == p.out_h ? s.grid_last : s.last * g.down;
    const int unit = g.planes;  // starts at a multiple of the pattern
    s.input_first = floor_div(floor_div(s.grid_first - g.row_shift, unit) * unit, g.up) + g.first_row;
    const int needed = floor_div(s.grid_last - 1 - g.row_shift, g.up) + g.first_row + g.steps_y;
    const int count = strip_input_rows(g, s.last - s.first);
    for (int i = s.input_first; i < s.input_first + count; ++i) {
        const T*& row = s.rows[i - s.input_first];
        row = s.zeros;
        if (i < 0 || i >= p.in_h || i >= needed) continue;  // values read there are discarded
        const T* from = x + i * p.x_stride[2];
        if (g.separable_u) {
            T* wide = s.wide + static_cast<sg_int64>(i - s.input_first) * g.row_width;
            read_row(g, from, bias, s.input);
            for (int c = 0; c < g.planes; ++c)
                filter_row(s.input, g.input_offset.data() + c * g.steps_x, g.up_x.data() + c * g.steps_x, g.steps_x,
                           g.plane_width, wide + static_cast<sg_int64>(c) * g.plane_width);
            row = wide;
        } else {
            T* input = s.input + static_cast<sg_int64>(i - s.input_first) * g.input_row_width;
            read_row(g, from, bias, input);
            row = input;
        }
    }
    if (g.separable_u) filter_columns<T, MODE>(g, s, plane);
    else if (g.steps_y == 6 && g.steps_x == 6) upsample_2d<T, 6, BLOCK, MODE>(g, s, plane);
    else upsample_2d<T, 0, 1, MODE>(g, s, plane);

    if (!g.separable_d) {
        const bool known = g.down == 2 && g.taps_dy == 12 && g.taps_dx == 12;
        if (known && g.mirrored_d) downsample_2d<T, 2, 12, BLOCK, true>(g, s, y, s.tall);
        else if (known) downsample_2d<T, 2, 12, BLOCK, false>(g, s, y, s.tall);
        else downsample_2d<T, 0, 0, 1, false>(g, s, y, s.tall);
        return;
    }
    T* spare = s.input;  // no longer needed
    for (int j = s.first; j < s.last; ++j) {
        const T* tall = s.tall + static_cast<sg_int64>(j - s.first) * g.row_width;
        if (!fused(g)) {
            const T* grid = s.grid + static_cast<sg_int64>(j * g.down - s.grid_first) * g.row_width;
            for (int i = 0; i < g.planes * g.plane_width; i += simd<T>::lanes) {
                vector_of<T> sum{};
                for (int k = 0; k < g.taps_dy; ++k)
                    sum += g.down_y[k] * load(grid + static_cast<sg_int64>(k) * g.row_width + i);
                store(s.tall + i, sum);
            }
            tall = s.tall;
        }
        write_row(g, tall, spare, y + j * p.y_stride[2]);
    }
}

template <class T, int MODE>
int run(const sg_filtered_lrelu_params& p) {
    const Geometry<T> g(&p);
    const sg_int64 image_planes = static_cast<sg_int64>(p.n) * p.c;
    const int rows = strip_rows(g, image_planes, p.num_threads), strips = ceil_div(p.out_h, rows);
    std::atomic<int> status{SG_OK};
    parallel_for(p.num_threads, image_planes * strips, [&](sg_int64 task) {
        const sg_int64 plane = task / strips;
        const int n = static_cast<int>(plane / p.c), c = static_cast<int>(plane % p.c);
        Strip<T> s;
        if (!allocate(g, rows, s)) {
            status = SG_NO_MEMORY;
            return;
        }
        s.first = static_cast<int>(task % strips) * rows;
        s.last = std::min(s.first + rows, p.out_h);
        const T bias = p.b && MODE != SG_GATE ? static_cast<const T*>(p.b)[c] : T(0);
        run_strip<T, MODE>(g, s, static_cast<const T*>(p.x) + n * p.x_stride[0] + c * p.x_stride[1], bias,
                           static_cast<T*>(p.y) + n * p.y_stride[0] + c * p.y_stride[1], plane);
    });
    return status;
}

template <class T>
int run(const sg_filtered_lrelu_params& p) {
    switch (p.mode) {
        case SG_ACTIVATE: return run<T, SG_ACTIVATE>(p);
        case SG_RECORD: return run<T, SG_RECORD>(p);
        case SG_GATE: return run<T, SG_GATE>(p);
        default: return SG_UNSUPPORTED;
    }
}

bool mask_fits(const sg_filtered_lrelu_params& p) {
    const int planes = p.up / std::gcd(p.up, p.down) * p.down;
    return p.mode == SG_ACTIVATE || p.mask_row_bytes >= 4 * planes * ceil_div(ceil_div(p.mask_w, planes), 16) + 4;
}

}  // namespace
}  // namespace sg

SG_EXPORT int sg_filtered_lrelu(const sg_filtered_lrelu_params* p) {
    if (p->x_stride[3] != 1 && p->in_w > 1) return SG_UNSUPPORTED;
    if (p->y_stride[3] != 1 && p->out_w > 1) return SG_UNSUPPORTED;
    if (p->mode == SG_RECORD && (p->mask_off_x || p->mask_off_y)) return SG_UNSUPPORTED;
    if (!sg::mask_fits(*p)) return SG_UNSUPPORTED;
    if (p->n == 0 || p->c == 0 || p->out_h == 0 || p->out_w == 0) return SG_OK;
    try {
        if (p->dtype == SG_F32) return sg::run<float>(*p);
        if (p->dtype == SG_F64) return sg::run<double>(*p);
    } catch (const std::bad_alloc&) {
        return SG_NO_MEMORY;
    }
    return SG_UNSUPPORTED;
}
