// bias_act on CUDA: one pass over dense memory, 16 bytes per thread and step.
//
// Macros: SG_DTYPE, SG_ACT, SG_ORDER, SG_CLAMP (0, 1), SG_HAS_REF (0, 1), SG_VECTOR (elements a step: 1, or
// 16 bytes), SG_BIAS (0 none, 1 one number for all elements of a step, 2 contiguous numbers, 3 index computed
// per element), SG_DB (order 1: 1 also sums per bias, with the macros of sums.cuh), SG_INDEX_64.
#include "bias_act.h"
#if SG_DB
#include "../sums.cuh"
#else
#include "../cuda.cuh"
#endif

__device__ __forceinline__ acc sigmoid(acc x) { return acc(1) / (acc(1) + exp(-x)); }

#define SELU_SCALE acc(1.0507009873554804934193349852946)
#define SELU_ALPHA acc(1.6732632423543772848170429916717)

__device__ __forceinline__ acc activated(acc u, acc alpha) {
#if SG_ACT == SG_LINEAR
    return u;
#elif SG_ACT == SG_RELU
    return u <= acc(0) ? acc(0) : u;  // NaN stays
#elif SG_ACT == SG_LRELU
    return u > acc(0) ? u : u * alpha;
#elif SG_ACT == SG_TANH
    return tanh(u);
#elif SG_ACT == SG_SIGMOID
    return sigmoid(u);
#elif SG_ACT == SG_ELU
    return u > acc(0) ? u : expm1(u);
#elif SG_ACT == SG_SELU
    return SELU_SCALE * (u > acc(0) ? u : SELU_ALPHA * expm1(u));
#elif SG_ACT == SG_SOFTPLUS
    return u > acc(20) ? u : log1p(exp(u));  // torch's becomes the identity there, too
#else
    return u * sigmoid(u);
#endif
}

// Derivatives; a is the activated value, for swish the input.
__device__ __forceinline__ acc slope(acc a, acc alpha) {
#if SG_ACT == SG_LINEAR
    return acc(1);
#elif SG_ACT == SG_RELU
    return a > acc(0) ? acc(1) : acc(0);
#elif SG_ACT == SG_LRELU
    return a > acc(0) ? acc(1) : alpha;
#elif SG_ACT == SG_TANH
    return acc(1) - a * a;
#elif SG_ACT == SG_SIGMOID
    return a * (acc(1) - a);
#elif SG_ACT == SG_ELU
    return a > acc(0) ? acc(1) : a + acc(1);
#elif SG_ACT == SG_SELU
    return a > acc(0) ? SELU_SCALE : a + SELU_SCALE * SELU_ALPHA;
#elif SG_ACT == SG_SOFTPLUS
    return -expm1(-a);
#else
    const acc s = sigmoid(a);
    return s * (acc(1) + a * (acc(1) - s));
#endif
}

__device__ __forceinline__ acc curvature(acc a) {
#if SG_ACT == SG_TANH
    return (acc(1) - a * a) * a * acc(-2);
#elif SG_ACT == SG_SIGMOID
    return a * (acc(1) - a) * (acc(1) - acc(2) * a);
#elif SG_ACT == SG_ELU
    return a > acc(0) ? acc(0) : a + acc(1);
#elif SG_ACT == SG_SELU
    return a > acc(0) ? acc(0) : a + SELU_SCALE * SELU_ALPHA;
#elif SG_ACT == SG_SOFTPLUS
    const acc s = -expm1(-a);
    return s * (acc(1) - s);
#elif SG_ACT == SG_SWISH
    const acc s = sigmoid(a);
    return s * (acc(1) - s) * (acc(2) + a * (acc(1) - acc(2) * s));
#else
    return acc(0);
#endif
}

__device__ __forceinline__ acc element(acc in, acc in2, acc ref, acc b, acc gain, acc alpha, acc clamp) {
#if SG_ORDER == 0
    const acc v = activated(in + b, alpha) * gain;
    return SG_CLAMP ? clamp_to(v, clamp) : v;
#else
#if SG_ACT == SG_SWISH
    const acc a = ref + b;
    const acc y = SG_CLAMP ? activated(a, alpha) * gain : acc(0);
#else
    // Only the sign matters for these two, and gain > 0.
    const acc a = SG_ACT == SG_RELU || SG_ACT == SG_LRELU ? ref : ref / gain;
    const acc y = ref;
#endif
#if SG_ORDER == 1
    acc v = in * (slope(a, alpha) * gain);
#else
    acc v = in * in2 * (curvature(a) * gain);
#endif
    if (SG_CLAMP && (y >= clamp || y <= -clamp)) v = acc(0);
    return v;
#endif
}

// The biases of the elements of a step.
__device__ __forceinline__ void read_bias(const sg_bias_act_params& p, offset_t first, acc* bias) {
    const scalar* const b = static_cast<const scalar*>(p.b);
    const unsigned_t size = static_cast<unsigned_t>(p.bias_size), every = static_cast<unsigned_t>(p.bias_step);
    const unsigned_t at = static_cast<unsigned_t>(first);  // unsigned division takes fewer instructions
#if SG_BIAS == 2
    read<SG_VECTOR>(b + at % size).unpack(bias);
#else
    const acc one = SG_BIAS == 1 ? load_acc(b + at / every % size) : acc(0);
#pragma unroll
    for (int k = 0; k < SG_VECTOR; ++k) bias[k] = SG_BIAS == 3 ? load_acc(b + (at + k) / every % size) : one;
#endif
}

#if SG_DB
struct value_t {
    elements<SG_VECTOR> in, ref;
};

__device__ __forceinline__ void with_sums(
    const sg_bias_act_params& p, const scalar* in, const scalar* ref, scalar* out, acc gain, acc alpha, acc clamp) {
    const offset_t plane = static_cast<offset_t>(p.bias_size == 1 ? p.size : p.bias_step);
    const offset_t size = SG_PLANAR ? plane : static_cast<offset_t>(p.size / p.bias_size);
    const part_t w =
        part_of(SG_PLANAR ? static_cast<offset_t>(p.size) / plane : 1, size, static_cast<int>(p.bias_size));
    acc sums[SG_CHUNKS][SG_VECTOR] = {};
    for_each_position<value_t>(
        w,
        [&](offset_t, offset_t element) {
            value_t v;
            v.in = read<SG_VECTOR>(in + element);
            if (SG_HAS_REF) v.ref = read<SG_VECTOR>(ref + element);
            return v;
        },
        [&](offset_t position, bool holds, const value_t* values) {
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k) {
                if (!holds || !w.has(k)) continue;
                const offset_t first = w.element(position, k);
                acc v[SG_VECTOR], at[SG_VECTOR] = {}, bias[SG_VECTOR];
                values[k].in.unpack(v);
                if (SG_HAS_REF) values[k].ref.unpack(at);
                read_bias(p, first, bias);
#pragma unroll
                for (int e = 0; e < SG_VECTOR; ++e) {
                    v[e] = element(v[e], acc(0), at[e], bias[e], gain, alpha, clamp);
                    sums[k][e] += v[e];
                }
                write<SG_VECTOR>(out + first, v);
            }
        });
    write_sums(w, sums, static_cast<acc*>(p.db));
}
#endif

extern "C" __global__ void __launch_bounds__(256) sg_bias_act_cuda(const sg_bias_act_params p) {
    const acc gain = static_cast<acc>(p.gain), alpha = static_cast<acc>(p.alpha), clamp = static_cast<acc>(p.clamp);
    const scalar *const in = static_cast<const scalar*>(p.in), *const in2 = static_cast<const scalar*>(p.in2);
    const scalar* const ref = static_cast<const scalar*>(p.ref);
    scalar* const out = static_cast<scalar*>(p.out);
#if SG_DB
    with_sums(p, in, ref, out, gain, alpha, clamp);
#else
    const offset_t steps = static_cast<offset_t>(p.size / SG_VECTOR);  // the plan ensures that there is no remainder
    const offset_t stride = static_cast<offset_t>(gridDim.x) * blockDim.x;
    for (offset_t step = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x; step < steps; step += stride) {
        const offset_t first = step * SG_VECTOR;
        elements<SG_VECTOR> packed = read<SG_VECTOR>(in + first), packed2 = {}, packed_ref = {};
        if (SG_ORDER == 2) packed2 = read<SG_VECTOR>(in2 + first);
        if (SG_ORDER > 0 && SG_HAS_REF) packed_ref = read<SG_VECTOR>(ref + first);
        acc v[SG_VECTOR], v2[SG_VECTOR], at[SG_VECTOR], bias[SG_VECTOR];
        packed.unpack(v);
        packed2.unpack(v2);
        packed_ref.unpack(at);
        read_bias(p, first, bias);
#pragma unroll
        for (int k = 0; k < SG_VECTOR; ++k) v[k] = element(v[k], v2[k], at[k], bias[k], gain, alpha, clamp);
        write<SG_VECTOR>(out + first, v);
    }
#endif
}
