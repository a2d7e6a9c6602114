// upfirdn2d on the CPU: polyphase filters on whole vectors; each number is read and written once.
//
// A separable filter runs along y first, from the rows of the image into one row in the L1 cache, and then along x to
// the output. Other filters run in one pass over rows copied per strip. Intermediate rows are zero-padded on both
// sides, so sums need no bounds checks. For channels-last images, both passes are sums of whole pixels.
#include "upfirdn2d.h"

#include <atomic>
#include <new>

#include "../parallel.h"
#include "filters.h"

namespace sg {
namespace upfirdn2d {
namespace {

const sg_int64 STRIP_BYTES = 256 * 1024;   // limit of a strip, to stay in the L2 cache
const sg_int64 TASK = 16384;               // outputs per task

// ---- Sums of taps times vectors

// to[k] = sum over t of taps[t] * the vector `at + k * lanes` behind from[t].
template <class T, int VECTORS>
SG_INLINE void sums(const T* const* from, const T* taps, int count, sg_int64 at, vector_of<T>* to) {
    for (int k = 0; k < VECTORS; ++k) to[k] = vector_of<T>{};
    for (int t = 0; t < count; ++t) {
        const T* p = from[t] + at;
        const vector_of<T> tap = all(taps[t]);
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS; ++k) to[k] += tap * load(p + k * simd<T>::lanes);
    }
}

template <class T>
SG_INLINE vector_of<T> some_sums(const T* const* from, const T* taps, int count, sg_int64 at, sg_int64 width) {
    vector_of<T> sum{};
    for (int t = 0; t < count; ++t) sum += taps[t] * load_some(from[t] + at, width);
    return sum;
}

// Write `width` sums to `to`, without reading or writing beyond them.
template <class T>
void combine(const T* const* from, const T* taps, int count, sg_int64 width, T* to) {
    constexpr int lanes = simd<T>::lanes;
    sg_int64 i = 0;
    for (; i + 4 * lanes <= width; i += 4 * lanes) {
        vector_of<T> v[4];
        sums<T, 4>(from, taps, count, i, v);
        for (int k = 0; k < 4; ++k) store(to + i + k * lanes, v[k]);
    }
    for (; i + lanes <= width; i += lanes) {
        vector_of<T> v;
        sums<T, 1>(from, taps, count, i, &v);
        store(to + i, v);
    }
    if (i < width) store_some(to + i, some_sums(from, taps, count, i, width - i), width - i);
}

// The same, with even sums to `even` and odd ones to `odd`, each followed by up to a vector of zeros.
template <class T>
void combine_apart(const T* const* from, const T* taps, int count, sg_int64 width, T* even, T* odd) {
    constexpr int lanes = simd<T>::lanes;
    for (sg_int64 i = 0; i < width; i += 2 * lanes) {
        vector_of<T> v[2];
        if (i + 2 * lanes <= width) {
            sums<T, 2>(from, taps, count, i, v);
        } else {
            v[0] = some_sums(from, taps, count, i, std::min<sg_int64>(lanes, width - i));
            v[1] = i + lanes < width ? some_sums(from, taps, count, i + lanes, width - i - lanes) : vector_of<T>{};
        }
        store(even + i / 2, every_second<T, 0>(v[0], v[1]));
        store(odd + i / 2, every_second<T, 1>(v[0], v[1]));
    }
}

// ---- Rows

// The terms of the outputs of one phase.
template <class T>
struct Terms {
    const T* const* from;
    const T* taps;
    int count;
};

// Rows between the passes: input columns split into x.in_phases planes, zero-padded.
template <class T>
struct Layout {
    static constexpr int lanes = simd<T>::lanes;
    int width;                // outputs per phase, a multiple of the lanes
    int first;                // first column of each plane, in units of planes
    int plane;                // numbers from one plane to the next
    sg_int64 row;             // numbers of a row
    int begin, column, end;   // image columns [column, end) begin at number `begin` of the first plane
    std::vector<int> offset;  // [x.out_phases][x.steps]: offset of a tap

    explicit Layout(const Filters<T>& g) {
        const Axis<T>& x = g.x;
        width = ceil_div(ceil_div(g.p->out_w, x.out_phases), lanes) * lanes;
        int lowest = std::numeric_limits<int>::max(), highest = std::numeric_limits<int>::min();
        for (int start : x.first) {
            lowest = std::min(lowest, floor_div(start, x.in_phases));
            highest = std::max(highest, floor_div(start + x.steps - 1, x.in_phases));
        }
        first = lowest;
        const int used = width + highest - lowest;
        plane = used + lanes;
        row = static_cast<sg_int64>(plane) * x.in_phases;
        begin = std::min(std::max(-first, 0), used);
        column = std::max(first, 0) * x.in_phases;
        const sg_int64 behind = (static_cast<sg_int64>(first) + used) * x.in_phases;
        end = static_cast<int>(std::min<sg_int64>(g.p->in_w, behind));
        for (int start : x.first)
            for (int t = 0; t < x.steps; ++t) {
                const int whole = floor_div(start + t, x.in_phases);
                offset.push_back((start + t - whole * x.in_phases) * plane + whole - first);
            }
    }
};

// Sum image rows, from the first column needed, into a row of planes.
template <class T>
void fill_row(const Filters<T>& g, const Layout<T>& layout, const Terms<T>& terms, T* line, T* row) {
    const int width = layout.end - layout.column, phases = g.x.in_phases;
    if (width <= 0) return;
    T* to = row + layout.begin;
    if (phases == 1) return combine(terms.from, terms.taps, terms.count, width, to);
    if (phases == 2) return combine_apart(terms.from, terms.taps, terms.count, width, to, to + layout.plane);
    combine(terms.from, terms.taps, terms.count, width, line);
    for (int r = 0; r < phases; ++r)
        for (int i = r, k = 0; i < width; i += phases, ++k) to[static_cast<sg_int64>(r) * layout.plane + k] = line[i];
}

template <class T>
void write_row(const Filters<T>& g, const Layout<T>& layout, const Terms<T>* terms, T* line, T* y) {
    constexpr int lanes = simd<T>::lanes;
    const int width = g.p->out_w, phases = g.x.out_phases;
    if (phases == 1) return combine(terms[0].from, terms[0].taps, terms[0].count, width, y);
    if (phases == 2) {
        for (int i = 0; 2 * i < width; i += lanes) {
            vector_of<T> even, odd;
            sums<T, 1>(terms[0].from, terms[0].taps, terms[0].count, i, &even);
            sums<T, 1>(terms[1].from, terms[1].taps, terms[1].count, i, &odd);
            const vector_of<T> low = zipped<T, 0>(even, odd), high = zipped<T, 1>(even, odd);
            const int left = width - 2 * i;
            if (left >= 2 * lanes) {
                store(y + 2 * i, low);
                store(y + 2 * i + lanes, high);
                continue;
            }
            store_some(y + 2 * i, low, std::min(lanes, left));
            if (left > lanes) store_some(y + 2 * i + lanes, high, left - lanes);
        }
        return;
    }
    for (int r = 0; r < phases; ++r) {
        combine(terms[r].from, terms[r].taps, terms[r].count, layout.width, line);
        for (int i = r, k = 0; i < width; i += phases, ++k) y[i] = line[k];
    }
}

// ---- Images with contiguous rows

// Scratch memory in parts, aligned to vectors.
struct Memory {
    unsigned char* next;
    static sg_int64 rounded(sg_int64 bytes) { return (bytes + 63) / 64 * 64; }
    template <class P>
    P* take(sg_int64 count) {
        unsigned char* start = next;
        next += rounded(count * static_cast<sg_int64>(sizeof(P)));
        return reinterpret_cast<P*>(start);
    }
};

template <class T>
struct Planar {
    const sg_upfirdn2d_params& p;
    const Filters<T>& g;
    const Layout<T> layout;
    int rows;       // of outputs, in a strip
    int held;       // rows stored per strip
    int terms;      // per output, at most
    sg_int64 line;  // numbers of an input or output row

    Planar(const sg_upfirdn2d_params& p_, const Filters<T>& g_) : p(p_), g(g_), layout(g_) {
        terms = g.product ? std::max(g.x.steps, g.y.steps) : g.x.steps * g.y.steps;
        line = std::max<sg_int64>(p.in_w, layout.width) + simd<T>::lanes;
        rows = static_cast<int>(std::min<sg_int64>(p.out_h, std::max<sg_int64>(8, TASK / p.out_w)));
        held = held_rows();
        while (!g.product && rows > 1 && held * layout.row * static_cast<sg_int64>(sizeof(T)) > STRIP_BYTES) {
            rows = ceil_div(rows, 2);
            held = held_rows();
        }
    }

    int held_rows() const { return g.product ? 1 : (rows * g.y.down) / g.y.up + g.y.steps + g.y.in_phases + 2; }

    sg_int64 bytes() const {
        const sg_int64 size = sizeof(T), pointers = sizeof(T*), lists = sizeof(Terms<T>) * g.x.out_phases;
        return Memory::rounded(held * layout.row * size) + Memory::rounded(line * size) + Memory::rounded(lists) +
               Memory::rounded(terms * pointers) + Memory::rounded(terms * g.x.out_phases * pointers);
    }

    // Output rows [first, last) of one plane.
    void run(const T* x, T* y, int first, int last, void* scratch) const {
        Memory memory{static_cast<unsigned char*>(scratch)};
        T* row = memory.take<T>(held * layout.row);
        T* spare = memory.take<T>(line);
        Terms<T>* lists = memory.take<Terms<T>>(g.x.out_phases);
        const T** above = memory.take<const T*>(terms);
        const T** beside = memory.take<const T*>(static_cast<sg_int64>(terms) * g.x.out_phases);
        std::fill_n(row, held * layout.row, T(0));
        x += layout.column;
        const int input_first = g.y.first_input(first);
        if (g.product) {
            for (size_t i = 0; i < layout.offset.size(); ++i) beside[i] = row + layout.offset[i];
            for (int r = 0; r < g.x.out_phases; ++r)
                lists[r] = {beside + r * g.x.steps, g.x.taps.data() + r * g.x.steps, g.x.count[r]};
        } else {
            copy_rows(x, input_first, last, above, spare, row);
        }
        for (int m = first; m < last; ++m, y += p.y_stride[2]) {
            const int r = m % g.y.out_phases, base = g.y.first_input(m);
            const int begin = std::max(0, -base), end = std::min(g.y.count[r], p.in_h - base);
            if (begin >= end) {
                std::fill_n(y, p.out_w, T(0));
                continue;
            }
            if (g.product) {
                for (int t = begin; t < end; ++t) above[t] = x + (base + t) * p.x_stride[2];
                const T* taps = g.y.taps.data() + r * g.y.steps;
                fill_row(g, layout, {above + begin, taps + begin, end - begin}, spare, row);
            } else {
                list_taps(row + (base - input_first) * layout.row, r, begin, end, beside, lists);
            }
            write_row(g, layout, lists, spare, y);
        }
    }

  private:
    void copy_rows(const T* x, int first, int last_output, const T** above, T* spare, T* row) const {
        const T one = 1;
        const int last = g.y.first_input(last_output - 1) + g.y.steps;
        for (int i = std::max(first, 0); i < std::min(last, p.in_h); ++i) {
            above[0] = x + i * p.x_stride[2];
            fill_row(g, layout, {above, &one, 1}, spare, row + (i - first) * layout.row);
        }
    }

    void list_taps(const T* row, int r, int begin, int end, const T** beside, Terms<T>* lists) const {
        for (int rx = 0; rx < g.x.out_phases; ++rx) {
            const int width = g.x.count[rx];
            lists[rx] = {beside, g.taps_2d[r * g.x.out_phases + rx].data() + begin * width, (end - begin) * width};
            for (int t = begin; t < end; ++t)
                for (int k = 0; k < width; ++k) *beside++ = row + t * layout.row + layout.offset[rx * g.x.steps + k];
        }
    }
};

template <class T>
int run_planar(const sg_upfirdn2d_params& p) {
    const Filters<T> g(&p);
    const Planar<T> image(p, g);
    const sg_int64 planes = static_cast<sg_int64>(p.n) * p.c, strips = ceil_div(p.out_h, image.rows);
    // Group small planes, as long as there is work for all threads.
    const sg_int64 worth = std::max<sg_int64>(1, TASK / (static_cast<sg_int64>(p.out_h) * p.out_w));
    const sg_int64 together = std::min(worth, std::max<sg_int64>(1, planes / (4 * std::max(p.num_threads, 1))));
    std::atomic<int> status{SG_OK};
    parallel_for(p.num_threads, (planes + together - 1) / together * strips, [&](sg_int64 task) {
        void* memory = scratch(static_cast<size_t>(image.bytes()));
        if (!memory) {
            status = SG_NO_MEMORY;
            return;
        }
        const int first = static_cast<int>(task % strips) * image.rows, last = std::min(first + image.rows, p.out_h);
        const sg_int64 begin = task / strips * together, end = std::min(begin + together, planes);
        for (sg_int64 plane = begin; plane < end; ++plane) {
            const sg_int64 n = plane / p.c, c = plane % p.c;
            const T* x = static_cast<const T*>(p.x) + n * p.x_stride[0] + c * p.x_stride[1];
            T* y = static_cast<T*>(p.y) + n * p.y_stride[0] + c * p.y_stride[1] + first * p.y_stride[2];
            image.run(x, y, first, last, memory);
        }
    });
    return status;
}

// ---- Images with contiguous channels

template <class T>
struct ChannelsLast {
    const sg_upfirdn2d_params& p;
    const Filters<T>& g;
    int rows;         // of outputs, in a strip
    int first, held;  // a row between the passes holds pixels [first, first + held)

    ChannelsLast(const sg_upfirdn2d_params& p_, const Filters<T>& g_) : p(p_), g(g_) {
        const sg_int64 numbers = static_cast<sg_int64>(p.out_w) * p.c;
        rows = static_cast<int>(std::min<sg_int64>(p.out_h, std::max<sg_int64>(1, TASK / numbers)));
        first = *std::min_element(g.x.first.begin(), g.x.first.end());
        const int highest = *std::max_element(g.x.first.begin(), g.x.first.end()) + g.x.steps;
        held = highest - first + (p.out_w - 1) / g.x.out_phases * g.x.in_phases;
    }

    int terms() const { return std::max(g.x.steps, g.y.steps) * (g.product ? 1 : std::min(g.x.steps, g.y.steps)); }

    sg_int64 bytes() const {
        const sg_int64 size = sizeof(T), pointers = sizeof(T*);
        const sg_int64 row = g.product ? static_cast<sg_int64>(held) * p.c * size : 0;
        return Memory::rounded(row) + Memory::rounded(terms() * pointers) + Memory::rounded(terms() * size);
    }

    void run(const T* x, T* y, int first_row, int last_row, void* scratch) const {
        Memory memory{static_cast<unsigned char*>(scratch)};
        T* row = memory.take<T>(g.product ? static_cast<sg_int64>(held) * p.c : 0);
        const T** from = memory.take<const T*>(terms());
        T* taps = memory.take<T>(terms());
        if (g.product) std::fill_n(row, static_cast<sg_int64>(held) * p.c, T(0));
        for (int m = first_row; m < last_row; ++m, y += p.y_stride[2]) {
            const int r = m % g.y.out_phases, base = g.y.first_input(m);
            const int begin = std::max(0, -base), end = std::min(g.y.count[r], p.in_h - base);
            if (g.product) fill_pixels(x + base * p.x_stride[2], r, begin, end, from, row);
            for (int k = 0; k < p.out_w; ++k) {
                const int rx = k % g.x.out_phases, left = g.x.first_input(k), width = g.x.count[rx];
                T* to = y + k * p.y_stride[3];
                if (g.product) {
                    for (int t = 0; t < width; ++t) from[t] = row + static_cast<sg_int64>(left + t - first) * p.c;
                    combine(from, g.x.taps.data() + rx * g.x.steps, begin < end ? width : 0, p.c, to);
                    continue;
                }
                const T* weights = g.taps_2d[r * g.x.out_phases + rx].data();
                int count = 0;
                for (int ty = begin; ty < end; ++ty)
                    for (int tx = std::max(0, -left); tx < std::min(width, p.in_w - left); ++tx, ++count) {
                        from[count] = x + (base + ty) * p.x_stride[2] + (left + tx) * p.x_stride[3];
                        taps[count] = weights[ty * width + tx];
                    }
                combine(from, taps, count, p.c, to);
            }
        }
    }

  private:
    void fill_pixels(const T* x, int r, int begin, int end, const T** from, T* row) const {
        const int left = std::max(first, 0), right = std::min(p.in_w, first + held);
        if (left >= right) return;
        for (int t = begin; t < end; ++t) from[t - begin] = x + t * p.x_stride[2] + left * p.x_stride[3];
        combine(from, g.y.taps.data() + r * g.y.steps + begin, std::max(0, end - begin),
                static_cast<sg_int64>(right - left) * p.c, row + static_cast<sg_int64>(left - first) * p.c);
    }
};

template <class T>
int run_channels_last(const sg_upfirdn2d_params& p) {
    const Filters<T> g(&p);
    if (g.product && p.x_stride[3] != p.c) return SG_UNSUPPORTED;  // a row is summed as one vector
    const ChannelsLast<T> image(p, g);
    const sg_int64 strips = ceil_div(p.out_h, image.rows);
    std::atomic<int> status{SG_OK};
    parallel_for(p.num_threads, p.n * strips, [&](sg_int64 task) {
        void* memory = scratch(static_cast<size_t>(image.bytes()));
        if (!memory) {
            status = SG_NO_MEMORY;
            return;
        }
        const int first = static_cast<int>(task % strips) * image.rows, last = std::min(first + image.rows, p.out_h);
        const sg_int64 n = task / strips;
        image.run(static_cast<const T*>(p.x) + n * p.x_stride[0],
                  static_cast<T*>(p.y) + n * p.y_stride[0] + first * p.y_stride[2], first, last, memory);
    });
    return status;
}

template <class T>
int run(const sg_upfirdn2d_params& p) {
    if ((p.x_stride[3] == 1 || p.in_w == 1) && (p.y_stride[3] == 1 || p.out_w == 1)) return run_planar<T>(p);
    if (p.x_stride[1] == 1 && p.y_stride[1] == 1 && p.c >= simd<T>::lanes) return run_channels_last<T>(p);
    return SG_UNSUPPORTED;
}

}  // namespace
}  // namespace upfirdn2d
}  // namespace sg

SG_EXPORT int sg_upfirdn2d(const sg_upfirdn2d_params* p) {
    if (p->n == 0 || p->c == 0 || p->out_h <= 0 || p->out_w <= 0) return SG_OK;
    try {
        if (p->dtype == SG_F32) return sg::upfirdn2d::run<float>(*p);
        if (p->dtype == SG_F64) return sg::upfirdn2d::run<double>(*p);
    } catch (const std::bad_alloc&) {
        return SG_NO_MEMORY;
    }
    return SG_UNSUPPORTED;
}
