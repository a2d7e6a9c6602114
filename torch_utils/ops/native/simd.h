// SIMD vectors of one element type, as wide as the machine supports, and bit masks of comparisons.
#ifndef SG_SIMD_H
#define SG_SIMD_H
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Vector extensions of GCC and clang. Other compilers cannot build the CPU library, and the ops run in plain torch.
#if defined(__AVX512F__)
#define SG_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SG_VECTOR_BYTES 32
#else
#define SG_VECTOR_BYTES 16
#endif
#define SG_INLINE inline __attribute__((always_inline))

namespace sg {

template <class T>
struct simd;

template <>
struct simd<float> {
    typedef float vector __attribute__((vector_size(SG_VECTOR_BYTES), may_alias));
    typedef int32_t integers __attribute__((vector_size(SG_VECTOR_BYTES), may_alias));
    static constexpr int lanes = SG_VECTOR_BYTES / 4;
};

template <>
struct simd<double> {
    typedef double vector __attribute__((vector_size(SG_VECTOR_BYTES), may_alias));
    typedef int64_t integers __attribute__((vector_size(SG_VECTOR_BYTES), may_alias));
    static constexpr int lanes = SG_VECTOR_BYTES / 8;
};

template <class T>
using vector_of = typename simd<T>::vector;

template <class T>
SG_INLINE vector_of<T> load(const T* p) {
    vector_of<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
SG_INLINE void store(T* p, vector_of<T> v) {
    std::memcpy(p, &v, sizeof v);
}

template <class T>
SG_INLINE vector_of<T> all(T value) {
    return value - vector_of<T>{};
}

// Load the first `count` lanes only; the others are zero.
template <class T>
SG_INLINE vector_of<T> load_some(const T* p, int64_t count) {
#if defined(__AVX512F__)
    const unsigned chosen = (1u << count) - 1;
    if constexpr (sizeof(T) == 4) return (vector_of<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(chosen), p);
    else return (vector_of<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(chosen), p);
#else
    vector_of<T> v{};
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
    return v;
#endif
}

template <class T>
SG_INLINE void store_some(T* p, vector_of<T> v, int64_t count) {
#if defined(__AVX512F__)
    const unsigned chosen = (1u << count) - 1;
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(chosen), (__m512)v);
    else _mm512_mask_storeu_pd(p, static_cast<__mmask8>(chosen), (__m512d)v);
#else
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
#endif
}

template <class T, size_t... LANE>
SG_INLINE vector_of<T> picked(vector_of<T> a, vector_of<T> b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, static_cast<int>(LANE)...);
#else
    return __builtin_shuffle(a, b, typename simd<T>::integers{LANE...});
#endif
}

// Interleave (a0 b0 a1 b1 …) the lower or upper half of the lanes; deinterleave every second lane of a and b.
template <class T, size_t HALF, size_t... K>
SG_INLINE vector_of<T> zipped(vector_of<T> a, vector_of<T> b, std::index_sequence<K...>) {
    return picked<T, (HALF * sizeof...(K) / 2 + K / 2 + K % 2 * sizeof...(K))...>(a, b);
}

template <class T, size_t HALF>
SG_INLINE vector_of<T> zipped(vector_of<T> a, vector_of<T> b) {
    return zipped<T, HALF>(a, b, std::make_index_sequence<simd<T>::lanes>());
}

template <class T, size_t FIRST, size_t... K>
SG_INLINE vector_of<T> every_second(vector_of<T> a, vector_of<T> b, std::index_sequence<K...>) {
    return picked<T, (FIRST + 2 * K)...>(a, b);
}

template <class T, size_t FIRST>
SG_INLINE vector_of<T> every_second(vector_of<T> a, vector_of<T> b) {
    return every_second<T, FIRST>(a, b, std::make_index_sequence<simd<T>::lanes>());
}

// One bit per lane, from a comparison (all ones or all zeros per lane).
template <class T>
SG_INLINE unsigned bits_of(typename simd<T>::integers c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_test_epi32_mask((__m512i)c, (__m512i)c);
    else return _mm512_test_epi64_mask((__m512i)c, (__m512i)c);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return static_cast<unsigned>(_mm256_movemask_ps((__m256)c));
    else return static_cast<unsigned>(_mm256_movemask_pd((__m256d)c));
#else
    unsigned bits = 0;
    for (int i = 0; i < simd<T>::lanes; ++i) bits |= static_cast<unsigned>(c[i] & 1) << i;
    return bits;
#endif
}

// v where the bit is set, zero elsewhere.
template <class T>
SG_INLINE vector_of<T> where(unsigned bits, vector_of<T> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (vector_of<T>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
    else return (vector_of<T>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v);
#else
    typedef typename simd<T>::integers integers;
    integers place{};
    for (int i = 0; i < simd<T>::lanes; ++i) place[i] = 1 << i;
    integers chosen = ((static_cast<int>(bits) - integers{}) & place) == place;
    return (vector_of<T>)((integers)v & chosen);
#endif
}

}  // namespace sg
#endif
