// Polyphase decomposition for upfirdn2d: which taps are applied to which pixels, and the layout of rows of vectors.
#ifndef SG_UPFIRDN2D_FILTERS_H
#define SG_UPFIRDN2D_FILTERS_H
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../simd.h"
#include "upfirdn2d.h"

namespace sg {
namespace upfirdn2d {

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Outputs come in lcm(up, down) / down phases, inputs in lcm(up, down) / up: output j * out_phases + r is the sum over
// t < count[r] of taps[r * steps + t] * in[j * in_phases + first[r] + t]. The numbers of a phase are contiguous.
template <class T>
struct Axis {
    int up, down, in_phases, out_phases, steps;
    std::vector<int> first, count, offset;  // [out_phases]; tap t of a phase is tap offset + t * up of the filter
    std::vector<T> taps;                    // [out_phases][steps], of separable filters

    Axis(int up_, int down_, int pad0, int size) : up(up_), down(down_) {
        const int period = up / std::gcd(up, down) * down;
        in_phases = period / up, out_phases = period / down, steps = ceil_div(size, up);
        for (int r = 0; r < out_phases; ++r) {
            const int start = pad0 - r * down, phase = start - floor_div(start, up) * up;
            offset.push_back(phase);
            first.push_back((phase - start) / up);
            count.push_back(phase < size ? ceil_div(size - phase, up) : 0);
        }
    }

    int first_input(int m) const { return m / out_phases * in_phases + first[m % out_phases]; }

    void deal_out(const std::vector<T>& line) {
        taps.assign(static_cast<size_t>(out_phases) * steps, T(0));
        for (int r = 0; r < out_phases; ++r)
            for (int t = 0; t < count[r]; ++t) taps[r * steps + t] = line[offset[r] + t * up];
    }
};

template <class T>
struct Filters {
    const sg_upfirdn2d_params* p;
    int taps_h, taps_w;
    Axis<T> y, x;
    bool product = true;                  // separable: two short passes instead of a long one
    std::vector<std::vector<T>> taps_2d;  // [y.out_phases * x.out_phases][y.count][x.count], of other filters

    explicit Filters(const sg_upfirdn2d_params* params)
        : p(params),
          taps_h(p->f_h ? p->f_h : p->f_w),
          taps_w(p->f_w),
          y(p->up_y, p->down_y, p->pad_y0, taps_h),
          x(p->up_x, p->down_x, p->pad_x0, taps_w) {
        const T* f = static_cast<const T*>(p->f);
        const size_t size = p->f_h ? static_cast<size_t>(taps_h) * taps_w : taps_w;
        std::vector<T> taps(size), column(taps_h), row(taps_w);
        for (size_t i = 0; i < size; ++i) taps[i] = f[p->flip_filter ? i : size - 1 - i];
        if (p->f_h == 0) column = row = taps;
        else product = factors(taps, column, row);
        const T gain = static_cast<T>(p->gain);
        for (T& tap : column) tap *= gain;
        if (product) {
            y.deal_out(column);
            x.deal_out(row);
        } else {
            deal_out(taps, gain);
        }
    }

  private:
    // Return whether the filter is separable up to rounding.
    bool factors(const std::vector<T>& f, std::vector<T>& column, std::vector<T>& row) const {
        size_t largest = 0;
        for (size_t i = 0; i < f.size(); ++i)
            if (std::abs(f[i]) > std::abs(f[largest])) largest = i;
        const int ky = static_cast<int>(largest) / taps_w, kx = static_cast<int>(largest) % taps_w;
        const T pivot = f[largest];
        for (int i = 0; i < taps_w; ++i) row[i] = f[ky * taps_w + i];
        for (int i = 0; i < taps_h; ++i) column[i] = pivot == 0 ? T(0) : f[i * taps_w + kx] / pivot;
        const T epsilon = std::numeric_limits<T>::epsilon();
        for (int i = 0; i < taps_h; ++i)
            for (int k = 0; k < taps_w; ++k) {
                const T tap = f[i * taps_w + k];
                if (!(std::abs(column[i] * row[k] - tap) <= epsilon * std::abs(tap))) return false;
            }
        return true;
    }

    void deal_out(const std::vector<T>& taps, T gain) {
        for (int ry = 0; ry < y.out_phases; ++ry)
            for (int rx = 0; rx < x.out_phases; ++rx) {
                taps_2d.emplace_back();
                for (int ty = 0; ty < y.count[ry]; ++ty)
                    for (int tx = 0; tx < x.count[rx]; ++tx)
                        taps_2d.back().push_back(
                            taps[(y.offset[ry] + ty * y.up) * taps_w + x.offset[rx] + tx * x.up] * gain);
            }
    }
};

}  // namespace upfirdn2d
}  // namespace sg
#endif
