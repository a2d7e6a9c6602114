// Memory layout of filtered_lrelu for rows of vectors.
#ifndef SG_FILTERED_LRELU_GEOMETRY_H
#define SG_FILTERED_LRELU_GEOMETRY_H
#include <algorithm>
#include <numeric>
#include <vector>

#include "../simd.h"
#include "filtered_lrelu.h"

namespace sg {

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int mod(int a, int b) { return a - floor_div(a, b) * b; }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The columns of the upsampled grid are split into `planes` = lcm(up, down) planes, column m into plane m % planes, so
// that each step of either filter reads and writes contiguous numbers. Likewise, input columns are split into
// `input_planes` = planes / up, and outputs into `output_planes` = planes / down.
//
// Rows are processed in groups of `up`: row m = q * up + p + row_shift. The shift makes all rows of a group read the
// same input rows, first_row + q to first_row + q + steps_y - 1.
template <class T>
struct Geometry {
    static constexpr int lanes = simd<T>::lanes;

    const sg_filtered_lrelu_params* p;
    int up, down, planes, input_planes, output_planes;
    int taps_uy, taps_ux, taps_dy, taps_dx;
    bool separable_u, separable_d;
    bool mirrored_d = false;           // the 2-D down filter is symmetric along x
    int steps_y, steps_x;              // taps per input pixel: taps / up, rounded up
    int grid_h, grid_w;
    int row_shift, first_row;
    int plane_width;                   // columns of a plane, a multiple of the lanes
    int row_width;                     // all planes, with padding to read beyond
    int input_width, input_row_width;  // of a plane of inputs, of all
    int input_first;                   // first column of each, in units of planes
    int mask_plane_bytes;
    std::vector<T> up_y;               // [up][steps_y], including the gain; separable only
    std::vector<T> up_x;               // [planes][steps_x]; separable only
    std::vector<T> up_2d;              // [planes][up][steps_x][steps_y]; 2-D only
    std::vector<T> down_y, down_x;     // [taps], with zeros up to a multiple of down; separable only
    std::vector<T> down_2d;            // [taps_x][taps_y]; 2-D only
    std::vector<int> input_offset;     // [planes][steps_x]: offset of a step in an input row
    std::vector<int> output_offset;    // [output_planes][taps_dx]: offset in a row of the grid

    explicit Geometry(const sg_filtered_lrelu_params* params) : p(params) {
        up = p->up, down = p->down;
        planes = up / std::gcd(up, down) * down;
        input_planes = planes / up, output_planes = planes / down;
        separable_u = p->fu_h == 0 || (p->fu_h == 1 && p->fu_w == 1);
        separable_d = p->fd_h == 0 || (p->fd_h == 1 && p->fd_w == 1);
        taps_ux = p->fu_w, taps_uy = p->fu_h ? p->fu_h : p->fu_w;
        taps_dx = p->fd_w, taps_dy = p->fd_h ? p->fd_h : p->fd_w;
        steps_y = ceil_div(taps_uy, up), steps_x = ceil_div(taps_ux, up);
        grid_h = (p->out_h - 1) * down + taps_dy;
        grid_w = (p->out_w - 1) * down + taps_dx;
        row_shift = mod(p->pad_y0 + 1, up);
        first_row = -((p->pad_y0 - row_shift - (up - 1)) / up);  // exact, because of the shift
        plane_width = ceil_div(ceil_div(grid_w, planes), lanes) * lanes;
        mask_plane_bytes = 2 * ceil_div(ceil_div(p->mask_w, planes), 16);
        lay_out_inputs();
        lay_out_outputs();
        deal_out_taps();
    }

    int vectors() const { return planes * plane_width / lanes; }

  private:
    T tap(const void* f, int count, int k) const {
        if (k >= count) return T(0);
        return static_cast<const T*>(f)[p->flip_filter ? k : count - 1 - k];
    }

    T tap_2d(const void* f, int height, int width, int ky, int kx) const {
        if (ky >= height || kx >= width) return T(0);
        if (!p->flip_filter) ky = height - 1 - ky, kx = width - 1 - kx;
        return static_cast<const T*>(f)[ky * width + kx];
    }

    void lay_out_inputs() {
        int lowest = 0, highest = 0;
        bool first = true;
        for (int c = 0; c < planes; ++c)
            for (int t = 0; t < steps_x; ++t) {
                int column = floor_div(step_column(c, t), input_planes);
                lowest = first ? column : std::min(lowest, column);
                highest = first ? column : std::max(highest, column);
                first = false;
            }
        input_first = lowest;
        input_width = plane_width + highest - lowest;
        input_row_width = ceil_div(input_planes * input_width + lanes, lanes) * lanes;
        input_offset.resize(planes * steps_x);
        for (int c = 0; c < planes; ++c)
            for (int t = 0; t < steps_x; ++t) {
                int column = step_column(c, t);
                input_offset[c * steps_x + t] =
                    mod(column, input_planes) * input_width + floor_div(column, input_planes) - lowest;
            }
    }

    int phase(int c) const { return mod(p->pad_x0 - c, up); }

    // The input column that step t multiplies for the first column of plane c.
    int step_column(int c, int t) const { return (c - p->pad_x0 + phase(c)) / up + t; }

    void lay_out_outputs() {
        int reach = 0;
        output_offset.resize(output_planes * taps_dx);
        for (int r = 0; r < output_planes; ++r)
            for (int k = 0; k < taps_dx; ++k) {
                int column = r * down + k;
                output_offset[r * taps_dx + k] = column % planes * plane_width + column / planes;
                reach = std::max(reach, column / planes);
            }
        row_width = planes * plane_width + ceil_div(reach + 2 * lanes, lanes) * lanes;
    }

    void deal_out_taps() {
        const T gain = static_cast<T>(p->up_gain);
        if (separable_u) {
            up_y.resize(up * steps_y);
            up_x.resize(planes * steps_x);
            for (int r = 0; r < up; ++r)
                for (int t = 0; t < steps_y; ++t)
                    up_y[r * steps_y + t] = tap(p->fu, taps_uy, t * up + up - 1 - r) * gain;
            for (int c = 0; c < planes; ++c)
                for (int t = 0; t < steps_x; ++t) up_x[c * steps_x + t] = tap(p->fu, taps_ux, t * up + phase(c));
        } else {
            up_2d.resize(static_cast<size_t>(planes) * up * steps_x * steps_y);
            T* next = up_2d.data();
            for (int c = 0; c < planes; ++c)
                for (int r = 0; r < up; ++r)
                    for (int tx = 0; tx < steps_x; ++tx)
                        for (int ty = 0; ty < steps_y; ++ty)
                            *next++ = tap_2d(p->fu, taps_uy, taps_ux, ty * up + up - 1 - r, tx * up + phase(c)) * gain;
        }
        if (separable_d) {
            down_y.resize(ceil_div(taps_dy, down) * down);
            down_x.resize(down_y.size());
            for (int k = 0; k < static_cast<int>(down_y.size()); ++k)
                down_y[k] = down_x[k] = tap(p->fd, taps_dy, k);
        } else {
            for (int kx = 0; kx < taps_dx; ++kx)
                for (int ky = 0; ky < taps_dy; ++ky) down_2d.push_back(tap_2d(p->fd, taps_dy, taps_dx, ky, kx));
            mirrored_d = taps_dx % 2 == 0;
            for (int kx = 0; kx < taps_dx; ++kx)
                for (int ky = 0; ky < taps_dy; ++ky)
                    mirrored_d = mirrored_d && down_2d[kx * taps_dy + ky] == down_2d[(taps_dx - 1 - kx) * taps_dy + ky];
        }
    }
};

}  // namespace sg
#endif
