// unit_distance on CUDA: two feature maps compared at each position, or the gradient of that to one of them, in one
// pass. The lanes of a warp that share a position hold its channels in registers.
//
// Macros: SG_DTYPE, SG_PLANAR (0), SG_VECTOR, SG_CHUNKS (sums.cuh), SG_WEIGHTS (0, 1), SG_GRAD (0, 1), SG_INDEX_64.
#include "unit_distance.h"
#include "../sums.cuh"

struct value_t {
    elements<SG_VECTOR> x, y;
    elements<1> s;
};

// a * b, rounded before it is added to anything: the difference of equal products is exactly 0.
__device__ __forceinline__ acc product(acc a, acc b) {
#ifdef SG_EMULATED
    return a * b;
#elif SG_DTYPE == SG_F64
    return __dmul_rn(a, b);
#else
    return __fmul_rn(a, b);
#endif
}

__device__ __forceinline__ acc inverse_root(acc v) {
#ifdef SG_EMULATED
    return acc(1) / std::sqrt(v);
#elif SG_DTYPE == SG_F64
    return rsqrt(v);
#else
    return rsqrtf(v);
#endif
}

extern "C" __global__ void __launch_bounds__(256) sg_unit_distance_cuda(const sg_unit_distance_params p) {
    const part_t w = part_of(1, static_cast<offset_t>(p.positions), p.channels);
    const scalar *const x = static_cast<const scalar*>(p.x), *const y = static_cast<const scalar*>(p.y);
    const scalar* const s = static_cast<const scalar*>(p.s);
    scalar* const out = static_cast<scalar*>(p.out);
    const int lanes = static_cast<int>(blockDim.x);
    acc weights[SG_CHUNKS][SG_VECTOR];
#pragma unroll
    for (int k = 0; k < SG_CHUNKS; ++k)
#pragma unroll
        for (int e = 0; e < SG_VECTOR; ++e)
            weights[k][e] = SG_WEIGHTS && w.has(k) ? static_cast<const acc*>(p.w)[w.channel(k) + e] : acc(1);

    for_each_position<value_t>(
        w,
        [&](offset_t position, offset_t element) {
            value_t v;
            v.x = read<SG_VECTOR>(x + element);
            v.y = read<SG_VECTOR>(y + element);
            if (SG_GRAD) v.s = read<1>(s + position);
            return v;
        },
        [&](offset_t position, bool holds, const value_t* values) {
            acc u[SG_CHUNKS][SG_VECTOR], v[SG_CHUNKS][SG_VECTOR];
            acc xx = acc(0), yy = acc(0);
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k) {
                values[k].x.unpack(u[k]);
                values[k].y.unpack(v[k]);
#pragma unroll
                for (int e = 0; e < SG_VECTOR; ++e) {
                    if (!w.has(k)) u[k][e] = v[k][e] = acc(0);
                    xx = mul_add(u[k][e], u[k][e], xx);
                    yy = mul_add(v[k][e], v[k][e], yy);
                }
            }
            const acc nx = inverse_root(sum_of_lanes(xx, lanes) + acc(1e-10));
            const acc ny = inverse_root(sum_of_lanes(yy, lanes) + acc(1e-10));
            acc factor = acc(1);
            if (SG_GRAD) {
                values[0].s.unpack(&factor);
                factor *= acc(2);
            }
            acc total = acc(0);
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k)
#pragma unroll
                for (int e = 0; e < SG_VECTOR; ++e) {
                    u[k][e] = product(u[k][e], nx);
                    const acc difference = u[k][e] - product(v[k][e], ny);
                    v[k][e] = weights[k][e] * difference * factor;  // with s the gradient to u
                    total = mul_add(v[k][e], SG_GRAD ? u[k][e] : difference, total);
                }
            total = sum_of_lanes(total, lanes);
            if (!holds) return;
            if (!SG_GRAD) {
                if (threadIdx.x == 0) store_acc(out + position, total);
                return;
            }
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k) {
                if (!w.has(k)) continue;
                acc dx[SG_VECTOR];
#pragma unroll
                for (int e = 0; e < SG_VECTOR; ++e) dx[e] = nx * mul_add(-u[k][e], total, v[k][e]);
                write<SG_VECTOR>(out + w.element(position, k), dx);
            }
        });
}
