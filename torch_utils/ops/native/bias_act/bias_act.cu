// bias_act on CUDA: one pass over dense memory, 16 bytes a thread and step.
//
// Macros: SG_DTYPE, SG_ACT, SG_ORDER, SG_CLAMP (0, 1), SG_HAS_REF (0, 1), SG_VECTOR (elements a step: 1, or
// 16 bytes), SG_BIAS (0 none, 1 one number for all elements of a step, 2 a number each, side by side, 3
// worked out for each), SG_INDEX_64.
#include "bias_act.h"
#include "../cuda.cuh"

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential_minus_1(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_minus_1(double x) { return expm1(x); }
__device__ __forceinline__ float logarithm_of_1_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double logarithm_of_1_plus(double x) { return log1p(x); }
__device__ __forceinline__ float tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double tangent(double x) { return tanh(x); }
__device__ __forceinline__ acc sigmoid(acc x) { return acc(1) / (acc(1) + exponential(-x)); }

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
    return tangent(u);
#elif SG_ACT == SG_SIGMOID
    return sigmoid(u);
#elif SG_ACT == SG_ELU
    return u > acc(0) ? u : exponential_minus_1(u);
#elif SG_ACT == SG_SELU
    return SELU_SCALE * (u > acc(0) ? u : SELU_ALPHA * exponential_minus_1(u));
#elif SG_ACT == SG_SOFTPLUS
    return u > acc(20) ? u : logarithm_of_1_plus(exponential(u));  // torch's becomes the identity there, too
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
    return a > acc(0) ? acc(0) : a + SELU_SCALE * SELU_ALPHA;
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

typedef several<scalar, SG_VECTOR> step_t;

__device__ __forceinline__ step_t read_step(const void* from, offset_t first) {
    return *reinterpret_cast<const step_t*>(static_cast<const scalar*>(from) + first);
}

// The biases of the elements of a step.
__device__ __forceinline__ void read_bias(const sg_bias_act_params& p, offset_t first, acc* bias) {
    const scalar* const b = static_cast<const scalar*>(p.b);
    const offset_t size = static_cast<offset_t>(p.bias_size), every = static_cast<offset_t>(p.bias_step);
#if SG_BIAS == 1
    const acc one = load_acc(b + first / every % size);
#elif SG_BIAS == 2
    const step_t many = read_step(b, first % size);
#endif
#pragma unroll
    for (int k = 0; k < SG_VECTOR; ++k) {
#if SG_BIAS == 0
        bias[k] = acc(0);
#elif SG_BIAS == 1
        bias[k] = one;
#elif SG_BIAS == 2
        bias[k] = to_acc(many.v[k]);
#else
        bias[k] = load_acc(b + (first + k) / every % size);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(256) sg_bias_act_cuda(const sg_bias_act_params p) {
    const acc gain = static_cast<acc>(p.gain), alpha = static_cast<acc>(p.alpha), clamp = static_cast<acc>(p.clamp);
    const offset_t steps = static_cast<offset_t>(p.size / SG_VECTOR);  // the plan sees to it that there is no rest
    const offset_t stride = static_cast<offset_t>(gridDim.x) * blockDim.x;
    for (offset_t step = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x; step < steps; step += stride) {
        const offset_t first = step * SG_VECTOR;
        const step_t in = read_step(p.in, first);
        step_t in2 = {}, ref = {}, out;
        if (SG_ORDER == 2) in2 = read_step(p.in2, first);
        if (SG_ORDER > 0 && SG_HAS_REF) ref = read_step(p.ref, first);
        acc bias[SG_VECTOR];
        read_bias(p, first, bias);
#pragma unroll
        for (int k = 0; k < SG_VECTOR; ++k)
            out.v[k] = from_acc<scalar>(
                element(to_acc(in.v[k]), to_acc(in2.v[k]), to_acc(ref.v[k]), bias[k], gain, alpha, clamp));
        *reinterpret_cast<step_t*>(static_cast<scalar*>(p.out) + first) = out;
    }
}
