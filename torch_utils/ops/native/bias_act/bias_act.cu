// bias_act on CUDA: one pass over dense memory, 16 bytes a thread and step.
//
// Macros: SG_DTYPE, SG_ACT, SG_ORDER, SG_CLAMP (0, 1), SG_HAS_REF (0, 1), SG_VECTOR (elements a step: 1, or 16 bytes),
// SG_BIAS (0 none, 1 one number for all elements of a step, 2 a number each, side by side, 3 worked out for each),
// SG_INDEX_64.
#include "bias_act.h"
#include "../cuda.cuh"

__device__ __forceinline__ acc exponential(acc x) { return sizeof(acc) == 8 ? static_cast<acc>(exp(static_cast<double>(x))) : static_cast<acc>(expf(static_cast<float>(x))); }
__device__ __forceinline__ acc exponential_minus_1(acc x) { return sizeof(acc) == 8 ? static_cast<acc>(expm1(static_cast<double>(x))) : static_cast<acc>(expm1f(static_cast<float>(x))); }
__device__ __forceinline__ acc sigmoid(acc x) { return acc(1) / (acc(1) + exponential(-x)); }

__device__ __forceinline__ acc activated(acc u, acc alpha) {
#if SG_ACT == SG_LINEAR
    return u;
#elif SG_ACT == SG_RELU
    return u > acc(0) ? u : u * acc(0);
#elif SG_ACT == SG_LRELU
    return u > acc(0) ? u : u * alpha;
#elif SG_ACT == SG_TANH
    return sizeof(acc) == 8 ? static_cast<acc>(tanh(static_cast<double>(u))) : static_cast<acc>(tanhf(static_cast<float>(u)));
#elif SG_ACT == SG_SIGMOID
    return sigmoid(u);
#elif SG_ACT == SG_ELU
    return u > acc(0) ? u : exponential_minus_1(u);
#elif SG_ACT == SG_SELU
    return acc(1.0507009873554804934193349852946) *
           (u > acc(0) ? u : acc(1.6732632423543772848170429916717) * exponential_minus_1(u));
#elif SG_ACT == SG_SOFTPLUS
    if (u > acc(20)) return u;  // where torch's becomes the identity
    return sizeof(acc) == 8 ? static_cast<acc>(log1p(exp(static_cast<double>(u))))
                            : static_cast<acc>(log1pf(expf(static_cast<float>(u))));
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
    const acc scale = acc(1.0507009873554804934193349852946), times_alpha = scale * acc(1.6732632423543772848170429916717);
    return a > acc(0) ? scale : a + times_alpha;
#elif SG_ACT == SG_SOFTPLUS
    return -exponential_minus_1(-a);
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
    return a > acc(0) ? acc(0) : a + acc(1.0507009873554804934193349852946) * acc(1.6732632423543772848170429916717);
#elif SG_ACT == SG_SOFTPLUS
    const acc s = -exponential_minus_1(-a);
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
    acc v = activated(in + b, alpha) * gain;
#if SG_CLAMP
    v = v > clamp ? clamp : v;
    v = v < -clamp ? -clamp : v;
#endif
    return v;
#else
#if SG_ACT == SG_SWISH
    const acc a = ref + b;
    const acc y = SG_CLAMP ? activated(a, alpha) * gain : acc(0);
#else
    const acc a = ref / gain, y = ref;
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

extern "C" __global__ void __launch_bounds__(256) sg_bias_act_cuda(const sg_bias_act_params p) {
    const scalar* const in = static_cast<const scalar*>(p.in);
    const scalar* const in2 = static_cast<const scalar*>(p.in2);
    const scalar* const ref = static_cast<const scalar*>(p.ref);
    const scalar* const b = static_cast<const scalar*>(p.b);
    scalar* const out = static_cast<scalar*>(p.out);
    const acc gain = static_cast<acc>(p.gain), alpha = static_cast<acc>(p.alpha), clamp = static_cast<acc>(p.clamp);
    const offset_t steps = static_cast<offset_t>((p.size + SG_VECTOR - 1) / SG_VECTOR);
    const offset_t stride = static_cast<offset_t>(gridDim.x) * blockDim.x;
    for (offset_t step = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x; step < steps; step += stride) {
        const offset_t first = step * SG_VECTOR;
#if SG_VECTOR > 1
        // Only dense multiples of 16 bytes come this way: there is no rest.
        wide_t in_wide = *reinterpret_cast<const wide_t*>(in + first), in2_wide, ref_wide, out_wide;
        if (SG_ORDER == 2) in2_wide = *reinterpret_cast<const wide_t*>(in2 + first);
        if (SG_ORDER > 0 && SG_HAS_REF) ref_wide = *reinterpret_cast<const wide_t*>(ref + first);
#endif
#if SG_BIAS == 1 || SG_BIAS == 2
        const offset_t place = first / static_cast<offset_t>(p.bias_step) % static_cast<offset_t>(p.bias_size);
#endif
#if SG_BIAS == 1
        const acc bias = load_acc(b + place);
#endif
#pragma unroll
        for (int k = 0; k < SG_VECTOR; ++k) {
#if SG_BIAS == 0
            const acc bias = acc(0);
#elif SG_BIAS == 2
            const acc bias = load_acc(b + place + k);
#elif SG_BIAS == 3
            const acc bias = load_acc(b + (first + k) / static_cast<offset_t>(p.bias_step) % static_cast<offset_t>(p.bias_size));
#endif
#if SG_VECTOR > 1
            const acc second = SG_ORDER == 2 ? to_acc(in2_wide.v[k]) : acc(0);
            const acc at = SG_ORDER > 0 && SG_HAS_REF ? to_acc(ref_wide.v[k]) : acc(0);
            out_wide.v[k] = from_acc<scalar>(element(to_acc(in_wide.v[k]), second, at, bias, gain, alpha, clamp));
#else
            const acc second = SG_ORDER == 2 ? load_acc(in2 + first) : acc(0);
            const acc at = SG_ORDER > 0 && SG_HAS_REF ? load_acc(ref + first) : acc(0);
            store_acc(out + first, element(load_acc(in + first), second, at, bias, gain, alpha, clamp));
#endif
        }
#if SG_VECTOR > 1
        *reinterpret_cast<wide_t*>(out + first) = out_wide;
#endif
    }
}
