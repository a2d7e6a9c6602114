// Activations and their derivatives, written once for doubles and for vectors of doubles.
//
// float32 is computed in float64 where an exponential is needed, which spares every care for cancellation; float64
// itself goes number by number through the C library.
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

inline double exponential(double x) { return std::exp(x); }
inline double exponential_minus_1(double x) { return std::expm1(x); }
inline double log_of_1_plus(double x) { return std::log1p(x); }
inline double tangent(double x) { return std::tanh(x); }

// Relative error below 1e-13: x = n log 2 + r with |r| <= log(2) / 2, a Taylor series for r, n into the exponent.
SG_INLINE wide exponential(wide x) {
    const double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
    x = x > 709.0 ? wide{} + INFINITY : x;
    wide bounded = x < -708.0 ? wide{} - 708.0 : x;
    bounded = bounded > 709.0 ? wide{} + 709.0 : bounded;
    const double magic = 6755399441055744.0;  // adding it rounds to an integer, which its last bits then hold
    const wide shifted = bounded * 1.44269504088896340736 + magic, n = shifted - magic;
    const wide r = bounded - n * log2_high - n * log2_low;
    wide p = wide{} + 1.0 / 479001600;
    const double inverse_factorials[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                         1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
    for (double c : inverse_factorials) p = p * r + c;
    wide_bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (((exponent & 0xfff) + 1023) & 0x7ff) << 52;
    wide scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    const wide result = p * scale;
    const wide beyond = x < -708.0 ? wide{} : result;
    return x == INFINITY ? x : x == x ? beyond : x;
}

SG_INLINE wide exponential_minus_1(wide x) {
    const wide far = exponential(x) - 1.0, near = x * (1.0 + x * (0.5 + x * (1.0 / 6)));
    return (x < 1e-4) & (x > -1e-4) ? near : far;
}

// For x >= 0, relative error below 1e-12.
SG_INLINE wide log_of_1_plus(wide x) {
    const wide y = 1.0 + x;
    wide_bits bits;
    std::memcpy(&bits, &y, sizeof bits);
    // y = m * 2^e with m between sqrt(1/2) and sqrt(2)
    const wide_bits e = (bits - 0x3fe6a09e667f3bcd) >> 52;
    const wide_bits mantissa = bits - (e << 52);
    wide m;
    std::memcpy(&m, &mantissa, sizeof m);
    const wide s = (m - 1.0) / (m + 1.0), z = s * s;
    wide p = wide{} + 1.0 / 17;
    for (int k = 15; k >= 1; k -= 2) p = p * z + 1.0 / k;
    const wide far = 2.0 * s * p + __builtin_convertvector(e, wide) * 0.69314718055994530942;
    const wide near = x * (1.0 - x * (0.5 - x * (1.0 / 3)));
    return x >= 1e-4 ? far : near;  // near is NaN for NaN, far is not
}

SG_INLINE wide tangent(wide x) {
    const wide bounded = x > 20.0 ? wide{} + 20.0 : x < -20.0 ? wide{} - 20.0 : x;
    const wide e = exponential_minus_1(bounded * 2.0);
    return e / (e + 2.0);
}

constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;
constexpr double LINEAR_ABOVE = 20.0;  // where torch's softplus becomes the identity

template <class R>
SG_INLINE R sigmoid(R u) {
    return 1.0 / (1.0 + exponential(-u));
}

template <int ACT, class R>
SG_INLINE R activated(R u) {
    if constexpr (ACT == SG_TANH) return tangent(u);
    if constexpr (ACT == SG_SIGMOID) return sigmoid(u);
    if constexpr (ACT == SG_ELU) return u > 0.0 ? u : exponential_minus_1(u > 0.0 ? R{} : u);
    if constexpr (ACT == SG_SELU)
        return SELU_SCALE * (u > 0.0 ? u : SELU_ALPHA * exponential_minus_1(u > 0.0 ? R{} : u));
    if constexpr (ACT == SG_SOFTPLUS)
        return u > LINEAR_ABOVE ? u : log_of_1_plus(exponential(u > LINEAR_ABOVE ? R{} : u));
    if constexpr (ACT == SG_SWISH) return u * sigmoid(u);
}

// First and second derivative; at is the activated value a, for swish the input u.
template <int ACT, class R>
SG_INLINE R slope(R a) {
    if constexpr (ACT == SG_TANH) return 1.0 - a * a;
    if constexpr (ACT == SG_SIGMOID) return a * (1.0 - a);
    if constexpr (ACT == SG_ELU) return a > 0.0 ? R{} + 1.0 : a + 1.0;
    if constexpr (ACT == SG_SELU) return a > 0.0 ? R{} + SELU_SCALE : a + SELU_SCALE * SELU_ALPHA;
    if constexpr (ACT == SG_SOFTPLUS) return a > LINEAR_ABOVE ? R{} + 1.0 : -exponential_minus_1(-a);
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
        const R s = -exponential_minus_1(-a);
        return a > LINEAR_ABOVE ? R{} : s * (1.0 - s);
    }
    if constexpr (ACT == SG_SWISH) {
        const R s = sigmoid(a);
        return s * (1.0 - s) * (2.0 + a * (1.0 - 2.0 * s));
    }
}

}  // namespace sg
#endif
