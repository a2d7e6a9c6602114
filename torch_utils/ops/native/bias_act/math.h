// Activations and their derivatives, written once for doubles and for vectors of doubles.
//
// Activations with an exponential compute float32 in float64, which avoids cancellation; float64 itself uses the C
// library, one number at a time. Vector functions are accurate to 1e-9, far beyond float32. Sigmoid, swish and their
// derivatives have no cancellation and are computed in float32, with twice as many elements per vector.
#ifndef SG_BIAS_ACT_MATH_H
#define SG_BIAS_ACT_MATH_H
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../simd.h"
#include "bias_act.h"

namespace sg {

constexpr int WIDE = SG_VECTOR_BYTES / 8;
typedef double wide __attribute__((vector_size(SG_VECTOR_BYTES)));
typedef int64_t wide_bits __attribute__((vector_size(SG_VECTOR_BYTES)));
typedef float narrow __attribute__((vector_size(SG_VECTOR_BYTES / 2)));
typedef float single __attribute__((vector_size(SG_VECTOR_BYTES)));

// The type that float32 is computed in, and the type that a step loads and stores.
template <bool SINGLE>
struct working {
    typedef double number;
    typedef wide vector;
    typedef narrow memory;
};

template <>
struct working<true> {
    typedef float number;
    typedef single vector;
    typedef single memory;
};

using std::exp;
using std::expm1;
using std::log1p;
using std::tanh;

// x = n log 2 + r with |r| <= log(2) / 2: exp(r) - 1 by a Taylor series (relative error below 2e-10), 2^n by its bits.
struct Split {
    wide power, rest;  // exp(x) = power * (1 + rest)
};

SG_INLINE Split split(wide x) {
    const double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
    wide bounded = x < -708.0 ? wide{} - 708.0 : x;  // beyond, float32 is zero or infinity; NaN is kept
    bounded = bounded > 709.0 ? wide{} + 709.0 : bounded;
    // Adding this constant rounds to an integer, stored in the lowest bits.
    const double magic = 6755399441055744.0 + 1023.0;
    const wide shifted = bounded * 1.44269504088896340736 + magic, n = shifted - magic;
    const wide r = bounded - n * log2_high - n * log2_low;
    wide q = wide{} + 1.0 / 362880;
    const double inverse_factorials[] = {1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0};
#pragma GCC unroll 8
    for (double c : inverse_factorials) q = q * r + c;
    wide_bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent <<= 52;
    Split parts;
    std::memcpy(&parts.power, &exponent, sizeof exponent);
    parts.rest = q * r;
    return parts;
}

// The same in float32: relative error below 2e-8, except for rounding; zero below 2^-126.
struct SplitSingle {
    single power, rest;
};

SG_INLINE SplitSingle split(single x) {
    single bounded = x < -87.0f ? single{} - 87.0f : x;
    bounded = bounded > 88.0f ? single{} + 88.0f : bounded;
    const float magic = 12582912.0f + 127.0f;
    const single shifted = bounded * 1.44269504088896340736f + magic, n = shifted - magic;
    const single r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    single q = single{} + 1.0f / 5040;
    const float inverse_factorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
#pragma GCC unroll 8
    for (float c : inverse_factorials) q = q * r + c;
    simd<float>::integers exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent <<= 23;
    SplitSingle parts;
    std::memcpy(&parts.power, &exponent, sizeof exponent);
    parts.rest = q * r;
    return parts;
}

SG_INLINE single exp(single x) {
    const SplitSingle parts = split(x);
    const single e = parts.power + parts.power * parts.rest;
    return x > 88.0f ? single{} + __builtin_inff() : e;  // so that the sigmoid becomes zero
}

SG_INLINE wide exp(wide x) {
    const Split parts = split(x);
    return parts.power + parts.power * parts.rest;
}

SG_INLINE wide expm1(wide x) {
    const Split parts = split(x);
    return parts.power * parts.rest + (parts.power - 1.0);  // near zero the power is 1: no cancellation
}

// For x >= 0.
SG_INLINE wide log1p(wide x) {
    const wide y = 1.0 + x;
    wide_bits bits;
    std::memcpy(&bits, &y, sizeof bits);
    // y = m * 2^e with m between sqrt(1/2) and sqrt(2)
    const wide_bits e = (bits - 0x3fe6a09e667f3bcd) >> 52;
    const wide_bits mantissa = bits - (e << 52);
    wide m;
    std::memcpy(&m, &mantissa, sizeof m);
    const wide s = (e == 0 ? x : m - 1.0) / (m + 1.0), z = s * s;  // m - 1 loses digits for small x
    wide p = wide{} + 1.0 / 13;
#pragma GCC unroll 8
    for (int k = 11; k >= 1; k -= 2) p = p * z + 1.0 / k;
    return 2.0 * s * p + __builtin_convertvector(e, wide) * 0.69314718055994530942;
}

SG_INLINE wide tanh(wide x) {
    const wide above = x > 20.0 ? wide{} + 20.0 : x, bounded = above < -20.0 ? wide{} - 20.0 : above;
    const wide e = expm1(bounded * 2.0);
    return e / (e + 2.0);
}

constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;
constexpr double LINEAR_ABOVE = 20.0;  // where torch's softplus becomes the identity

template <class R>
SG_INLINE R sigmoid(R u) {
    return 1.0 / (1.0 + exp(-u));
}

template <int ACT, class R>
SG_INLINE R activated(R u) {
    if constexpr (ACT == SG_TANH) return tanh(u);
    if constexpr (ACT == SG_SIGMOID) return sigmoid(u);
    if constexpr (ACT == SG_ELU) return u > 0.0 ? u : expm1(u > 0.0 ? R{} : u);
    if constexpr (ACT == SG_SELU)
        return SELU_SCALE * (u > 0.0 ? u : SELU_ALPHA * expm1(u > 0.0 ? R{} : u));
    if constexpr (ACT == SG_SOFTPLUS)
        return u > LINEAR_ABOVE ? u : log1p(exp(u > LINEAR_ABOVE ? R{} : u));
    if constexpr (ACT == SG_SWISH) return u * sigmoid(u);
}

// First and second derivative; at is the activated value a, for swish the input u.
template <int ACT, class R>
SG_INLINE R slope(R a) {
    if constexpr (ACT == SG_TANH) return 1.0 - a * a;
    if constexpr (ACT == SG_SIGMOID) return a * (1.0 - a);
    if constexpr (ACT == SG_ELU) return a > 0.0 ? R{} + 1.0 : a + 1.0;
    if constexpr (ACT == SG_SELU) return a > 0.0 ? R{} + SELU_SCALE : a + SELU_SCALE * SELU_ALPHA;
    if constexpr (ACT == SG_SOFTPLUS) return a > LINEAR_ABOVE ? R{} + 1.0 : -expm1(-a);
    if constexpr (ACT == SG_SWISH) {
        const R s = sigmoid(a);
        return s * (1.0 + a * (1.0 - s));
    }
}

template <int ACT, class R>
SG_INLINE R curvature(R a) {
    if constexpr (ACT == SG_TANH) return (1.0 - a * a) * a * -2.0;
    if constexpr (ACT == SG_SIGMOID) return a * (1.0 - a) * (1.0 - 2.0 * a);
    if constexpr (ACT == SG_ELU) return a > 0.0 ? R{} : a + 1.0;
    if constexpr (ACT == SG_SELU) return a > 0.0 ? R{} : a + SELU_SCALE * SELU_ALPHA;
    if constexpr (ACT == SG_SOFTPLUS) {
        const R s = -expm1(-a);
        return a > LINEAR_ABOVE ? R{} : s * (1.0 - s);
    }
    if constexpr (ACT == SG_SWISH) {
        const R s = sigmoid(a);
        return s * (1.0 - s) * (2.0 + a * (1.0 - 2.0 * s));
    }
}

}  // namespace sg
#endif
