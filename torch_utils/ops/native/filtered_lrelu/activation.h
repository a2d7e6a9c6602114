// Activation of a vector of the upsampled grid, and the layout of its mask (two bits per element).
#ifndef SG_FILTERED_LRELU_ACTIVATION_H
#define SG_FILTERED_LRELU_ACTIVATION_H
#include "geometry.h"

namespace sg {

// A row of the mask: for each plane of columns the bits "gradient times 1", then for each plane the bits "gradient
// times slope". Neither: clamped, gradient 0. lcm(up, down), and therefore the planes, are the same in the op and in
// its backward pass, so the bits of a vector are contiguous up to a shift.
template <class T, int MODE>
struct Activation {
    static constexpr int lanes = simd<T>::lanes;

    const Geometry<T>& g;
    vector_of<T> slope, low, high;
    bool clamps;
    const unsigned char* mask;       // of this image plane
    unsigned char* written;
    // State of the current column of vectors:
    sg_int64 byte = 0, second = 0;   // byte of its bits in a row; offset to the slope bits
    int right = 0, left = 0;         // shifts that bring them to lane 0
    unsigned valid = 0;              // lanes inside the mask

    Activation(const Geometry<T>& geometry, sg_int64 plane)
        : g(geometry),
          slope(all(static_cast<T>(g.p->slope))),
          low(all(static_cast<T>(-g.p->clamp))),
          high(all(static_cast<T>(g.p->clamp))),
          clamps(g.p->clamp >= 0) {
        sg_int64 offset = plane * g.p->mask_h * g.p->mask_row_bytes;
        mask = written = MODE == SG_ACTIVATE ? nullptr : g.p->mask + offset;
        second = static_cast<sg_int64>(g.planes) * g.mask_plane_bytes;
    }

    void take_column(int index) {
        if (MODE == SG_ACTIVATE) return;
        int vectors = g.plane_width / lanes;
        int column = index / vectors + (MODE == SG_GATE ? g.p->mask_off_x : 0);
        int plane = mod(column, g.planes);
        int x = index % vectors * lanes + floor_div(column, g.planes);
        int width = (g.p->mask_w - plane + g.planes - 1) / g.planes;  // columns of the mask in this plane
        valid = 0;
        for (int i = 0; i < lanes; ++i) valid |= static_cast<unsigned>(x + i >= 0 && x + i < width) << i;
        if (MODE == SG_GATE && !valid) x = 0;  // outside the mask
        byte = static_cast<sg_int64>(plane) * g.mask_plane_bytes + std::max(x, 0) / 8;
        right = x > 0 ? x % 8 : 0;
        left = x < 0 ? -x : 0;
    }

    unsigned read(const unsigned char* at) const {
        uint32_t word;
        std::memcpy(&word, at, 4);
        return (word >> right << left) & valid;
    }

    void write(unsigned char* at, unsigned bits) const {
        if (lanes == 16) {
            uint16_t half = static_cast<uint16_t>(bits);
            std::memcpy(at, &half, 2);
        } else if (lanes == 8 || right == 0) {
            *at = static_cast<unsigned char>(bits);
        } else {
            *at = static_cast<unsigned char>(*at | bits << right);
        }
    }

    // Return the activated vector of row m; `owned`: this strip writes the bits of this row.
    SG_INLINE vector_of<T> operator()(vector_of<T> u, int m, bool owned) const {
        if (MODE == SG_GATE) {
            int row = m + g.p->mask_off_y;
            if (row < 0 || row >= g.p->mask_h) return vector_of<T>{};
            const unsigned char* at = mask + static_cast<sg_int64>(row) * g.p->mask_row_bytes + byte;
            unsigned passes = read(at), scaled = read(at + second);
            // The lanes are disjoint, so OR replaces addition.
            typedef typename simd<T>::integers integers;
            return (vector_of<T>)((integers)where<T>(passes, u) | (integers)where<T>(scaled, u * slope));
        }
        typename simd<T>::integers positive = u > vector_of<T>{};
        vector_of<T> v = positive ? u : u * slope;
        if (MODE == SG_RECORD) {
            unsigned passes = bits_of<T>(positive), inside = valid;
            if (clamps) inside &= bits_of<T>((v <= high) & (v >= low));
            if (owned) {
                unsigned char* at = written + static_cast<sg_int64>(m) * g.p->mask_row_bytes + byte;
                write(at, passes & inside);
                write(at + second, ~passes & inside);
            }
        }
        if (clamps) {
            v = v > high ? high : v;
            v = v < low ? low : v;
        }
        return v;
    }
};

}  // namespace sg
#endif
