// upfirdn2d on the CPU: strips of rows that stay in cache, polyphase filters, whole vectors throughout.
//
// Outputs along x come in lcm(up, down) / down phases, inputs in lcm(up, down) / up, so that each phase of a row is a
// filter over contiguous numbers. A filter that is a product of two runs along x first, once for each input row, then
// along y; any other runs in one pass.
#include "upfirdn2d.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace sg {
namespace {

const sg_int64 STRIP_BYTES = 256 * 1024;  // what a strip may hold, so that it stays in the second-level cache

int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Along one axis: output j * out_phases + r is the sum over t of taps[r * steps + t] * in[j * in_phases + first[r] + t].
template <class T>
struct Axis {
    int up, down, in_phases, out_phases, steps;
    std::vector<int> first;   // [out_phases]
    std::vector<int> offset;  // [out_phases]: index of the first tap, those of step t are t * up further
    std::vector<T> taps;      // [out_phases][steps]; empty where the filter is not a product

    Axis(int up_, int down_, int pad0, int count) : up(up_), down(down_) {
        const int period = up / std::gcd(up, down) * down;
        in_phases = period / up, out_phases = period / down, steps = ceil_div(count, up);
        for (int r = 0; r < out_phases; ++r) {
            const int start = pad0 - r * down, phase = start - floor_div(start, up) * up;
            offset.push_back(phase);
            first.push_back((phase - start) / up);
        }
    }

    void deal_out(const std::vector<T>& line) {
        for (int r = 0; r < out_phases; ++r)
            for (int t = 0; t < steps; ++t) {
                const int k = offset[r] + t * up;
                taps.push_back(k < static_cast<int>(line.size()) ? line[k] : T(0));
            }
    }
};

template <class T>
struct Geometry {
    static constexpr int lanes = simd<T>::lanes;

    const sg_upfirdn2d_params* p;
    int taps_h, taps_w;
    Axis<T> y, x;
    bool product = true;
    std::vector<T> taps_2d;        // [y.out_phases][x.out_phases][y.steps][x.steps]
    int width;                     // numbers of an output phase, a multiple of the lanes
    int row_width;                 // all phases, and a vector to spare
    int input_first, input_width;  // of an input phase: its first column, how many
    std::vector<int> input_offset; // [x.out_phases][x.steps]: where in a row of inputs the numbers of a step begin

    explicit Geometry(const sg_upfirdn2d_params* params)
        : p(params),
          taps_h(p->f_h ? p->f_h : p->f_w),
          taps_w(p->f_w),
          y(p->up_y, p->down_y, p->pad_y0, taps_h),
          x(p->up_x, p->down_x, p->pad_x0, taps_w) {
        width = ceil_div(ceil_div(p->out_w, x.out_phases), lanes) * lanes;
        row_width = x.out_phases * width + lanes;
        lay_out_inputs();
        deal_out_taps();
    }

    int input_row_width() const { return x.in_phases * input_width + lanes; }

  private:
    void lay_out_inputs() {
        int lowest = std::numeric_limits<int>::max(), highest = std::numeric_limits<int>::min();
        for (int first : x.first) {
            lowest = std::min(lowest, floor_div(first, x.in_phases));
            highest = std::max(highest, floor_div(first + x.steps - 1, x.in_phases));
        }
        input_first = lowest;
        input_width = width + highest - lowest;
        for (int first : x.first)
            for (int t = 0; t < x.steps; ++t) {
                const int column = floor_div(first + t, x.in_phases);
                const int phase = first + t - column * x.in_phases;
                input_offset.push_back(phase * input_width + column - lowest);
            }
    }

    void deal_out_taps() {
        const T* f = static_cast<const T*>(p->f);
        const T gain = static_cast<T>(p->gain);
        std::vector<T> column(taps_h), row(taps_w);
        if (p->f_h == 0) {
            for (int k = 0; k < taps_w; ++k) column[k] = row[k] = f[p->flip_filter ? k : taps_w - 1 - k];
        } else {
            std::vector<T> all_taps(static_cast<size_t>(taps_h) * taps_w);
            for (size_t i = 0; i < all_taps.size(); ++i) all_taps[i] = f[p->flip_filter ? i : all_taps.size() - 1 - i];
            product = factors(all_taps, column, row);
            if (!product) {
                for (int ry = 0; ry < y.out_phases; ++ry)
                    for (int rx = 0; rx < x.out_phases; ++rx)
                        for (int ty = 0; ty < y.steps; ++ty)
                            for (int tx = 0; tx < x.steps; ++tx) {
                                const int ky = y.offset[ry] + ty * y.up, kx = x.offset[rx] + tx * x.up;
                                taps_2d.push_back(ky < taps_h && kx < taps_w ? all_taps[ky * taps_w + kx] * gain : T(0));
                            }
                return;
            }
        }
        for (T& tap : column) tap *= gain;
        y.deal_out(column);
        x.deal_out(row);
    }

    // Whether every tap is, up to its last bit, a product of one number for its row and one for its column: two short
    // passes then do what one long pass does.
    bool factors(const std::vector<T>& f, std::vector<T>& column, std::vector<T>& row) const {
        size_t largest = 0;
        for (size_t i = 0; i < f.size(); ++i)
            if (std::abs(f[i]) > std::abs(f[largest])) largest = i;
        const int ky = static_cast<int>(largest) / taps_w, kx = static_cast<int>(largest) % taps_w;
        const T pivot = f[largest];
        for (int i = 0; i < taps_w; ++i) row[i] = f[ky * taps_w + i];
        for (int i = 0; i < taps_h; ++i) column[i] = pivot == 0 ? T(0) : f[i * taps_w + kx] / pivot;
        for (int i = 0; i < taps_h; ++i)
            for (int k = 0; k < taps_w; ++k) {
                const T tap = f[i * taps_w + k];
                if (!(std::abs(column[i] * row[k] - tap) <= std::numeric_limits<T>::epsilon() * std::abs(tap))) return false;
            }
        return true;
    }
};

// Memory of one strip of output rows, and where it is in the image.
template <class T>
struct Strip {
    int first, last;   // output rows [first, last)
    int input_first;   // the input row of rows[0]
    T* zeros;
    T* input;          // one row, or all where the filter is no product
    T* wide;           // rows filtered along x
    T* out;            // one row of outputs, in phases
    const T** rows;
};

template <class T>
int strip_inputs(const Geometry<T>& g, int rows) {
    return (rows * g.y.down) / g.y.up + g.y.steps + g.y.in_phases + 2;
}

template <class T>
sg_int64 strip_bytes(const Geometry<T>& g, int rows) {
    const sg_int64 inputs = strip_inputs(g, rows);
    sg_int64 cells = std::max(g.row_width, g.input_row_width()) + g.row_width;
    cells += g.product ? g.input_row_width() + inputs * g.row_width : inputs * g.input_row_width();
    return cells * static_cast<sg_int64>(sizeof(T)) + inputs * static_cast<sg_int64>(sizeof(T*)) + 512;
}

template <class T>
bool allocate(const Geometry<T>& g, int rows, Strip<T>& s) {
    unsigned char* memory = static_cast<unsigned char*>(scratch(static_cast<size_t>(strip_bytes(g, rows))));
    if (!memory) return false;
    auto take = [&memory](sg_int64 count, sg_int64 size) {
        unsigned char* start = memory;
        memory += (count * size + 63) / 64 * 64;
        return start;
    };
    const sg_int64 inputs = strip_inputs(g, rows), size = sizeof(T), widest = std::max(g.row_width, g.input_row_width());
    s.zeros = reinterpret_cast<T*>(take(widest, size));
    std::fill_n(s.zeros, widest, T(0));
    s.input = reinterpret_cast<T*>(take((g.product ? 1 : inputs) * g.input_row_width(), size));
    s.wide = reinterpret_cast<T*>(take(g.product ? inputs * g.row_width : 0, size));
    s.out = reinterpret_cast<T*>(take(g.row_width, size));
    s.rows = reinterpret_cast<const T**>(take(inputs, sizeof(T*)));
    return true;
}

template <class T>
void read_row(const Geometry<T>& g, const T* x, T* to) {
    for (int r = 0; r < g.x.in_phases; ++r) {
        T* phase = to + static_cast<sg_int64>(r) * g.input_width;
        const int begin = std::min(std::max(-g.input_first, 0), g.input_width);
        int end = floor_div(g.p->in_w - 1 - r, g.x.in_phases) + 1 - g.input_first;
        end = std::max(std::min(end, g.input_width), begin);
        const T* from = x + static_cast<sg_int64>(g.input_first) * g.x.in_phases + r;
        std::fill_n(phase, begin, T(0));
        if (g.x.in_phases == 1) std::copy(from + begin, from + end, phase + begin);
        else if (g.x.in_phases == 2) for (int i = begin; i < end; ++i) phase[i] = from[2 * i];
        else for (int i = begin; i < end; ++i) phase[i] = from[static_cast<sg_int64>(i) * g.x.in_phases];
        std::fill_n(phase + end, g.input_width - end, T(0));
    }
    std::fill_n(to + static_cast<sg_int64>(g.x.in_phases) * g.input_width, g.lanes, T(0));
}

// to[i] = sum over t of taps[t] * rows[t][i], for whole vectors.
template <class T, int STEPS>
void combine(const T* const* rows, const T* taps, int steps, int width, T* to) {
    const int count = STEPS ? STEPS : steps;
    for (int i = 0; i < width; i += simd<T>::lanes) {
        vector_of<T> sum = taps[0] * load(rows[0] + i);
#pragma GCC unroll 8
        for (int t = 1; t < count; ++t) sum += taps[t] * load(rows[t] + i);
        store(to + i, sum);
    }
}

template <class T>
void combine(const T* const* rows, const T* taps, int steps, int width, T* to) {
    switch (steps) {
        case 1: return combine<T, 1>(rows, taps, steps, width, to);
        case 2: return combine<T, 2>(rows, taps, steps, width, to);
        case 3: return combine<T, 3>(rows, taps, steps, width, to);
        case 4: return combine<T, 4>(rows, taps, steps, width, to);
        case 6: return combine<T, 6>(rows, taps, steps, width, to);
        default: return combine<T, 0>(rows, taps, steps, width, to);
    }
}

// The same for any width.
template <class T>
void combine_to_end(const T* const* rows, const T* taps, int steps, int width, T* to) {
    const int whole = width / simd<T>::lanes * simd<T>::lanes;
    combine(rows, taps, steps, whole, to);
    if (whole == width) return;
    vector_of<T> sum{};
    for (int t = 0; t < steps; ++t) sum += taps[t] * load(rows[t] + whole);
    store_some(to + whole, sum, width - whole);
}

template <class T>
void filter_row(const Geometry<T>& g, const T* input, T* to) {
    const T* starts[64];
    for (int r = 0; r < g.x.out_phases; ++r) {
        const int* offsets = g.input_offset.data() + r * g.x.steps;
        const T* taps = g.x.taps.data() + r * g.x.steps;
        T* phase = to + static_cast<sg_int64>(r) * g.width;
        if (g.x.steps <= 64) {
            for (int t = 0; t < g.x.steps; ++t) starts[t] = input + offsets[t];
            combine(starts, taps, g.x.steps, g.width, phase);
            continue;
        }
        for (int i = 0; i < g.width; i += g.lanes) {
            vector_of<T> sum{};
            for (int t = 0; t < g.x.steps; ++t) sum += taps[t] * load(input + offsets[t] + i);
            store(phase + i, sum);
        }
    }
}

template <class T>
void write_row(const Geometry<T>& g, const T* from, T* y) {
    const int width = g.p->out_w, phases = g.x.out_phases;
    if (phases == 1) {
        std::copy_n(from, width, y);
    } else if (phases == 2) {
        const T *even = from, *odd = from + g.width;
        for (int i = 0; i < width / 2; ++i) y[2 * i] = even[i], y[2 * i + 1] = odd[i];
        if (width % 2) y[width - 1] = even[width / 2];
    } else {
        for (int r = 0; r < phases; ++r)
            for (int i = r, k = 0; i < width; i += phases, ++k) y[i] = from[static_cast<sg_int64>(r) * g.width + k];
    }
}

template <class T>
void run_strip(const Geometry<T>& g, Strip<T>& s, const T* x, T* y) {
    const sg_upfirdn2d_params& p = *g.p;
    auto first_input = [&g](int row) {
        const int j = floor_div(row, g.y.out_phases);
        return j * g.y.in_phases + g.y.first[row - j * g.y.out_phases];
    };
    s.input_first = first_input(s.first);
    const int count = first_input(s.last - 1) + g.y.steps - s.input_first;
    for (int k = 0; k < count; ++k) {
        const int i = s.input_first + k;
        s.rows[k] = s.zeros;
        if (i < 0 || i >= p.in_h) continue;
        if (g.product) {
            T* wide = s.wide + static_cast<sg_int64>(k) * g.row_width;
            read_row(g, x + i * p.x_stride[2], s.input);
            filter_row(g, s.input, wide);
            s.rows[k] = wide;
        } else {
            T* input = s.input + static_cast<sg_int64>(k) * g.input_row_width();
            read_row(g, x + i * p.x_stride[2], input);
            s.rows[k] = input;
        }
    }
    for (int m = s.first; m < s.last; ++m) {
        const int r = m % g.y.out_phases;
        const T* const* rows = s.rows + (first_input(m) - s.input_first);
        T* to = y + m * p.y_stride[2];
        if (g.product) {
            const T* taps = g.y.taps.data() + r * g.y.steps;
            if (g.x.out_phases == 1) {
                combine_to_end(rows, taps, g.y.steps, p.out_w, to);
                continue;
            }
            combine(rows, taps, g.y.steps, g.x.out_phases * g.width, s.out);
        } else {
            const T* taps = g.taps_2d.data() + static_cast<sg_int64>(r) * g.x.out_phases * g.y.steps * g.x.steps;
            for (int rx = 0; rx < g.x.out_phases; ++rx, taps += g.y.steps * g.x.steps) {
                const int* offsets = g.input_offset.data() + rx * g.x.steps;
                for (int i = 0; i < g.width; i += g.lanes) {
                    vector_of<T> sum{};
                    for (int ty = 0; ty < g.y.steps; ++ty)
                        for (int tx = 0; tx < g.x.steps; ++tx)
                            sum += taps[ty * g.x.steps + tx] * load(rows[ty] + offsets[tx] + i);
                    store(s.out + static_cast<sg_int64>(rx) * g.width + i, sum);
                }
            }
        }
        write_row(g, s.out, to);
    }
}

template <class T>
int run(const sg_upfirdn2d_params& p) {
    const Geometry<T> g(&p);
    const sg_int64 planes = static_cast<sg_int64>(p.n) * p.c;
    int rows = p.out_h;
    while (rows > 8 && (strip_bytes(g, rows) > STRIP_BYTES ||
                        (p.num_threads > 1 && planes * ceil_div(p.out_h, rows) < 2 * p.num_threads)))
        rows = ceil_div(rows, 2);
    const int strips = ceil_div(p.out_h, rows);
    std::atomic<int> status{SG_OK};
    parallel_for(p.num_threads, planes * strips, [&](sg_int64 task) {
        const sg_int64 plane = task / strips;
        const sg_int64 n = plane / p.c, c = plane % p.c;
        Strip<T> s;
        if (!allocate(g, rows, s)) {
            status = SG_NO_MEMORY;
            return;
        }
        s.first = static_cast<int>(task % strips) * rows;
        s.last = std::min(s.first + rows, p.out_h);
        run_strip(g, s, static_cast<const T*>(p.x) + n * p.x_stride[0] + c * p.x_stride[1],
                  static_cast<T*>(p.y) + n * p.y_stride[0] + c * p.y_stride[1]);
    });
    return status;
}

}  // namespace
}  // namespace sg

SG_EXPORT int sg_upfirdn2d(const sg_upfirdn2d_params* p) {
    if (p->x_stride[3] != 1 && p->in_w > 1) return SG_UNSUPPORTED;
    if (p->y_stride[3] != 1 && p->out_w > 1) return SG_UNSUPPORTED;
    if (p->n == 0 || p->c == 0 || p->out_h <= 0 || p->out_w <= 0) return SG_OK;
    try {
        if (p->dtype == SG_F32) return sg::run<float>(*p);
        if (p->dtype == SG_F64) return sg::run<double>(*p);
    } catch (const std::bad_alloc&) {
        return SG_NO_MEMORY;
    }
    return SG_UNSUPPORTED;
}
