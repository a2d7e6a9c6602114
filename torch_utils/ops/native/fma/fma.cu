// fma on CUDA: multiplication by a number per image and channel, and its gradients, in one pass over the images.
//
// Macros: SG_DTYPE, SG_PLANAR, SG_VECTOR, SG_CHUNKS (sums.cuh), SG_ADDEND (0 none, 1 one number, 2 an image without
// channels), SG_DB (0, 1), SG_DC (0, 1; 0 if planar), SG_INDEX_64.
#include "fma.h"
#include "../sums.cuh"

typedef elements<SG_VECTOR> step_t;

struct value_t {
    step_t in, other;
    elements<SG_PLANAR ? SG_VECTOR : 1> c;
};

extern "C" __global__ void __launch_bounds__(256) sg_fma_cuda(const sg_fma_params p) {
    const offset_t size = static_cast<offset_t>(p.size);
    const part_t w = part_of(SG_PLANAR ? static_cast<offset_t>(p.n) * p.channels : p.n, size, p.channels);
    const scalar *const in = static_cast<const scalar*>(p.in), *const other = static_cast<const scalar*>(p.other);
    const scalar *const b = static_cast<const scalar*>(p.b), *const c = static_cast<const scalar*>(p.c);
    scalar *const out = static_cast<scalar*>(p.out), *const dc = static_cast<scalar*>(p.dc);
    const offset_t image = SG_PLANAR ? w.group / p.channels : w.group;
    const offset_t c_base = SG_ADDEND == 2 ? image * static_cast<offset_t>(p.c_step) : 0;
    const acc number = SG_ADDEND == 1 ? load_acc(c) : acc(0);
    elements<SG_PLANAR ? 1 : SG_VECTOR> factors[SG_CHUNKS];
#pragma unroll
    for (int k = 0; k < SG_CHUNKS; ++k) {
        const offset_t first = SG_PLANAR ? w.group : w.group * p.channels + (w.has(k) ? w.channel(k) : 0);
        factors[k] = read<SG_PLANAR ? 1 : SG_VECTOR>(b + first);
    }
    acc sums[SG_CHUNKS][SG_VECTOR] = {};

    for_each_position<value_t>(
        w,
        [&](offset_t position, offset_t element) {
            value_t v;
            v.in = read<SG_VECTOR>(in + element);
            if (SG_DB) v.other = read<SG_VECTOR>(other + element);
            if (SG_ADDEND == 2)
                v.c = read<SG_PLANAR ? SG_VECTOR : 1>(c + c_base + position * (SG_PLANAR ? SG_VECTOR : 1));
            return v;
        },
        [&](offset_t position, bool holds, const value_t* values) {
            acc over_channels = acc(0);
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k) {
                if (!holds || !w.has(k)) continue;
                acc x[SG_VECTOR], with[SG_VECTOR], factor[SG_VECTOR], add[SG_VECTOR];
                values[k].in.unpack(x);
                factors[k].unpack(factor);
                if (SG_DB) values[k].other.unpack(with);
                if (SG_ADDEND == 2) values[k].c.unpack(add);
#pragma unroll
                for (int e = 0; e < SG_VECTOR; ++e) {
                    if (SG_DB) sums[k][e] = mul_add(x[e], with[e], sums[k][e]);
                    if (SG_DC) over_channels += x[e];
                    x[e] = mul_add(x[e], factor[SG_PLANAR ? 0 : e], SG_ADDEND == 2 ? add[SG_PLANAR ? e : 0] : number);
                }
                write<SG_VECTOR>(out + w.element(position, k), x);
            }
            if (SG_DC) {
                over_channels = sum_of_lanes(over_channels, static_cast<int>(blockDim.x));
                if (holds && threadIdx.x == 0) store_acc(dc + w.group * size + position, over_channels);
            }
        });
#if SG_DB
    write_sums(w, sums, static_cast<acc*>(p.db));
#endif
}
