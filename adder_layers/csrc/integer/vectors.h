// Vector types and operations of each instruction set for the integer kernels; only kernels.cpp includes this.
//
// ADDERKIT_FLOAT_SUMS: sums are added as doubles. The bits of an integer below 2^52 are those of the denormal number of
// as many units, and denormal numbers add exactly, so the result is the same. AMD's Zen 4 sums differences in two of its
// four vector pipes and adds integers in any of them, including those two; doubles are added in the other two, so nothing
// waits. Denormal numbers must not be flushed to zero meanwhile (network.cpp), and cost nothing on that CPU.
#pragma once

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace adderkit {
namespace {

template <typename T>
inline T load(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

// Requantization: kWide channels of one position in 64-bit lanes. The product takes the lanes' low 32 bits, signed; what
// is shifted is not negative.
#if defined(__AVX512BW__)

constexpr Index kWide = 8;
typedef std::int64_t Wide __attribute__((vector_size(64)));
inline Wide product(Wide a, Wide b) { return (Wide)_mm512_mul_epi32((__m512i)a, (__m512i)b); }
inline Wide shift_right(Wide total, Wide by) { return (Wide)_mm512_srlv_epi64((__m512i)total, (__m512i)by); }
inline Wide widen(const Byte* p) { return (Wide)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(load<std::int64_t>(p))); }
inline std::uint64_t narrow(Wide codes) { return _mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)codes)); }
inline std::uint64_t saturate(Wide codes) { return _mm_cvtsi128_si64(_mm512_cvtusepi64_epi8((__m512i)codes)); }

#elif defined(__AVX2__)

constexpr Index kWide = 4;
typedef std::int64_t Wide __attribute__((vector_size(32)));
inline Wide product(Wide a, Wide b) { return (Wide)_mm256_mul_epi32((__m256i)a, (__m256i)b); }
inline Wide shift_right(Wide total, Wide by) { return (Wide)_mm256_srlv_epi64((__m256i)total, (__m256i)by); }
inline Wide widen(const Byte* p) { return (Wide)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load<std::int32_t>(p))); }
inline std::uint64_t narrow(Wide codes) {
    const __m256i low = _mm256_shuffle_epi8((__m256i)codes, _mm256_set1_epi32(0x80800800));
    return std::uint32_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(low))) |
           std::uint32_t(_mm_cvtsi128_si32(_mm256_extracti128_si256(low, 1))) << 16;
}

#else

constexpr Index kWide = 1;
using Wide = std::int64_t;
inline Wide product(Wide a, Wide b) { return a * b; }
inline Wide shift_right(Wide total, Wide by) { return total >> by; }
inline Wide widen(const Byte* p) { return *p; }
inline std::uint64_t narrow(Wide code) { return code; }

#endif

#if !defined(__AVX512BW__)
inline std::uint64_t saturate(Wide codes) {
    const Wide most = 255 - Wide{};
    return narrow(codes < most ? codes : most);
}
#endif

// Differences: 8 bytes of a window, broadcast, against those of each of kLanes filters; Sums accumulate them by filter.
// `part` extracts the sums of kWide filters.
#if defined(__AVX512BW__)

constexpr Index kPositions = 6, kLanes = 8, kVectors = 4;
using Bytes = __m512i;
using Sums = __m512i;
inline Bytes broadcast(std::uint64_t value) { return _mm512_set1_epi64(value); }
inline Bytes differences(Bytes x, Bytes w) { return _mm512_sad_epu8(x, w); }
#if defined(ADDERKIT_FLOAT_SUMS)
inline Sums add(Sums sum, Bytes found) { return (Sums)_mm512_add_pd((__m512d)sum, (__m512d)found); }
#else
inline Sums add(Sums sum, Bytes found) { return _mm512_add_epi64(sum, found); }
#endif
inline Wide part(Sums sum, int) { return (Wide)sum; }

#elif defined(__AVX2__)

constexpr Index kPositions = 6, kLanes = 4, kVectors = 2;
using Bytes = __m256i;
using Sums = __m256i;
inline Bytes broadcast(std::uint64_t value) { return _mm256_set1_epi64x(value); }
inline Bytes differences(Bytes x, Bytes w) { return _mm256_sad_epu8(x, w); }
inline Sums add(Sums sum, Bytes found) { return _mm256_add_epi64(sum, found); }
inline Wide part(Sums sum, int) { return (Wide)sum; }

#elif defined(__SSE2__)

constexpr Index kPositions = 6, kLanes = 2, kVectors = 2;
using Bytes = __m128i;
using Sums = __m128i;
inline Bytes broadcast(std::uint64_t value) { return _mm_set1_epi64x(value); }
inline Bytes differences(Bytes x, Bytes w) { return _mm_sad_epu8(x, w); }
inline Sums add(Sums sum, Bytes found) { return _mm_add_epi64(sum, found); }
inline Wide part(Sums sum, int i) { return _mm_cvtsi128_si64(i == 0 ? sum : _mm_unpackhi_epi64(sum, sum)); }

#elif defined(__ARM_NEON)

constexpr Index kPositions = 6, kLanes = 2, kVectors = 4;
using Bytes = uint8x16_t;
using Sums = uint32x4_t;
inline Bytes broadcast(std::uint64_t value) { return vreinterpretq_u8_u64(vdupq_n_u64(value)); }
inline uint16x8_t differences(Bytes x, Bytes w) { return vpaddlq_u8(vabdq_u8(x, w)); }
inline Sums add(Sums sum, uint16x8_t found) { return vpadalq_u16(sum, found); }
inline Sums add(Sums sum, Sums other) { return vaddq_u32(sum, other); }
inline Wide part(Sums sum, int i) {
    const uint64x2_t wide = vpaddlq_u32(sum);
    return i == 0 ? vgetq_lane_u64(wide, 0) : vgetq_lane_u64(wide, 1);
}

#else

constexpr Index kPositions = 4, kLanes = 1, kVectors = 4;
struct Bytes {
    Byte value[8];
};
using Sums = std::int64_t;
inline Bytes broadcast(std::uint64_t value) { return load<Bytes>(&value); }
inline Sums differences(const Bytes& x, const Bytes& w) {
    Sums sum = 0;
    for (int i = 0; i < 8; ++i) sum += x.value[i] > w.value[i] ? x.value[i] - w.value[i] : w.value[i] - x.value[i];
    return sum;
}
inline Sums add(Sums sum, Sums found) { return sum + found; }
inline Wide part(Sums sum, int) { return sum; }

#endif

// Products of 4 bytes of a window with 4 signed bytes of each filter. Pairs of products must not be added in 16 bits,
// as 255 * 127 + 255 * 127 does not fit; so without VNNI both sides are widened first.
#if defined(__AVX512VNNI__)

constexpr Index kProductLanes = 16, kProductVectors = 2;
using Products = __m512i;
using Quads = __m512i;
inline Quads broadcast_quad(std::uint32_t value) { return _mm512_set1_epi32(value); }
inline Products add_products(Products sum, Quads x, const Byte* w) {
    return _mm512_dpbusd_epi32(sum, x, load<__m512i>(w));
}

#elif defined(__AVX2__)

constexpr Index kProductLanes = 8, kProductVectors = 1;
using Products = __m256i;
struct Quads {
    __m256i even, odd;
};
inline Quads broadcast_quad(std::uint32_t value) {
    const __m256i all = _mm256_set1_epi32(value);
    return {_mm256_and_si256(all, _mm256_set1_epi32(0x00ff00ff)), _mm256_srli_epi16(all, 8)};
}
inline Products add_products(Products sum, const Quads& x, const Byte* w) {
    const __m256i all = load<__m256i>(w);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(x.even, even), _mm256_madd_epi16(x.odd, odd)));
}

#elif defined(__SSE2__)

constexpr Index kProductLanes = 4, kProductVectors = 1;
using Products = __m128i;
struct Quads {
    __m128i even, odd;
};
inline Quads broadcast_quad(std::uint32_t value) {
    const __m128i all = _mm_set1_epi32(value);
    return {_mm_and_si128(all, _mm_set1_epi32(0x00ff00ff)), _mm_srli_epi16(all, 8)};
}
inline Products add_products(Products sum, const Quads& x, const Byte* w) {
    const __m128i all = load<__m128i>(w);
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(all, 8), 8), odd = _mm_srai_epi16(all, 8);
    return _mm_add_epi32(sum, _mm_add_epi32(_mm_madd_epi16(x.even, even), _mm_madd_epi16(x.odd, odd)));
}

#else

constexpr Index kProductLanes = 4, kProductVectors = 1;
struct Products {
    std::int32_t value[4];
};
struct Quads {
    Byte value[4];
};
inline Quads broadcast_quad(std::uint32_t value) { return load<Quads>(&value); }
inline Products add_products(Products sum, Quads x, const Byte* w) {
    for (int o = 0; o < 4; ++o)
        for (int i = 0; i < 4; ++i) sum.value[o] += x.value[i] * static_cast<std::int8_t>(w[4 * o + i]);
    return sum;
}

#endif

typedef std::int32_t ProductSums __attribute__((vector_size(4 * kProductLanes)));
typedef std::int64_t WideProductSums __attribute__((vector_size(8 * kProductLanes)));

inline void store_products(std::int64_t* p, const Products& sum) {
    const WideProductSums wide = __builtin_convertvector(load<ProductSums>(&sum), WideProductSums);
    __builtin_memcpy(p, &wide, sizeof wide);
}

}  // namespace
}  // namespace adderkit
