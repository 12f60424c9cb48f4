// Sums of bytes for quantized networks. This file is compiled once for each instruction set, with
// ADDERKIT_INTEGER_KERNELS naming its table. Everything here but the table at the end has internal linkage, and nothing
// of the standard library is instantiated (see kernels.cpp).
//
// The instruction that sums 8 absolute differences of bytes serves 8 bytes of the window: a vector holds 8 bytes of each
// of several filters, the window's 8 bytes are broadcast against it, and each 64-bit lane gathers the sum of one filter.
// So no sum is ever taken across lanes.
#include "integer_kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace adderkit {
namespace {

#define ADDERKIT_UNROLL _Pragma("GCC unroll 8")

template <typename T>
inline T load(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

// What an instruction set brings: kLanes filters in a vector of Bytes; `Sums` gather them.
#if defined(__AVX512BW__)

constexpr Index kPositions = 6, kLanes = 8, kVectors = 4;
using Bytes = __m512i;
using Sums = __m512i;
inline Bytes broadcast(std::uint64_t value) { return _mm512_set1_epi64(value); }
inline Sums add_differences(Sums sum, Bytes x, Bytes w) { return _mm512_add_epi64(sum, _mm512_sad_epu8(x, w)); }
inline void store(std::int64_t* p, Sums sum) { _mm512_storeu_si512(p, sum); }

#elif defined(__AVX2__)

constexpr Index kPositions = 6, kLanes = 4, kVectors = 2;
using Bytes = __m256i;
using Sums = __m256i;
inline Bytes broadcast(std::uint64_t value) { return _mm256_set1_epi64x(value); }
inline Sums add_differences(Sums sum, Bytes x, Bytes w) { return _mm256_add_epi64(sum, _mm256_sad_epu8(x, w)); }
inline void store(std::int64_t* p, Sums sum) { _mm256_storeu_si256((__m256i*)p, sum); }

#elif defined(__SSE2__)

constexpr Index kPositions = 6, kLanes = 2, kVectors = 2;
using Bytes = __m128i;
using Sums = __m128i;
inline Bytes broadcast(std::uint64_t value) { return _mm_set1_epi64x(value); }
inline Sums add_differences(Sums sum, Bytes x, Bytes w) { return _mm_add_epi64(sum, _mm_sad_epu8(x, w)); }
inline void store(std::int64_t* p, Sums sum) { _mm_storeu_si128((__m128i*)p, sum); }

#elif defined(__ARM_NEON)

constexpr Index kPositions = 6, kLanes = 2, kVectors = 4;
using Bytes = uint8x16_t;
using Sums = uint32x4_t;
inline Bytes broadcast(std::uint64_t value) { return vreinterpretq_u8_u64(vdupq_n_u64(value)); }
inline Sums add_differences(Sums sum, Bytes x, Bytes w) { return vpadalq_u16(sum, vpaddlq_u8(vabdq_u8(x, w))); }
inline void store(std::int64_t* p, Sums sum) { vst1q_s64(p, vreinterpretq_s64_u64(vpaddlq_u32(sum))); }

#else

constexpr Index kPositions = 4, kLanes = 1, kVectors = 4;
struct Bytes {
    Byte value[8];
};
using Sums = std::int64_t;
inline Bytes broadcast(std::uint64_t value) { return load<Bytes>(&value); }
inline Sums add_differences(Sums sum, const Bytes& x, const Bytes& w) {
    for (int i = 0; i < 8; ++i) sum += x.value[i] > w.value[i] ? x.value[i] - w.value[i] : w.value[i] - x.value[i];
    return sum;
}
inline void store(std::int64_t* p, Sums sum) { *p = sum; }

#endif

// Bytes of a window's run beyond its end are 0 here as they are in the weights: no distance.
inline std::uint64_t load_tail(const Byte* p, Index length) {
    return load<std::uint64_t>(p) & (~std::uint64_t{0} >> (64 - 8 * length));  // written for little-endian machines
}

template <int Vectors, int Positions>
inline void adder_step(Sums (&sum)[Positions][Vectors], const std::uint64_t (&x)[Positions], const Byte* weight) {
    Bytes w[Vectors];
    ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) w[v] = load<Bytes>(weight + v * sizeof(Bytes));
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) {
        const Bytes value = broadcast(x[p]);
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] = add_differences(sum[p][v], value, w[v]);
    }
}

template <int Vectors, int Positions>
void adder_tile(const Byte* const* x, const Runs& runs, const Byte* weight, std::int64_t* sums) {
    const Byte* source[Positions];
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) source[p] = x[p];
    Sums sum[Positions][Vectors] = {};
    const Index whole = runs.length & ~Index{7}, tail = runs.length & 7;
    for (Index r = 0; r < runs.count; ++r) {
        Index i = runs.offsets[r];
        for (const Index end = i + whole; i < end; i += 8, weight += Vectors * sizeof(Bytes)) {
            std::uint64_t value[Positions];
            ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) value[p] = load<std::uint64_t>(source[p] + i);
            adder_step(sum, value, weight);
        }
        if (tail > 0) {
            std::uint64_t value[Positions];
            ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) value[p] = load_tail(source[p] + i, tail);
            adder_step(sum, value, weight);
            weight += Vectors * sizeof(Bytes);
        }
    }
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p)
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) store(sums + p * kMaxChannels + v * kLanes, sum[p][v]);
}

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

// Weights beyond a run's end are 0, so what is read there does not count.
template <int Vectors, int Positions>
void convolution_tile(const Byte* const* x, const Runs& runs, const Byte* weight, std::int64_t* sums) {
    const Byte* source[Positions];
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) source[p] = x[p];
    Products sum[Positions][Vectors] = {};
    for (Index r = 0; r < runs.count; ++r) {
        const Index begin = runs.offsets[r];
        for (Index i = begin; i < begin + runs.length; i += 4, weight += Vectors * kProductLanes * 4) {
            ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) {
                const Quads value = broadcast_quad(load<std::uint32_t>(source[p] + i));
                ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
                    sum[p][v] = add_products(sum[p][v], value, weight + v * kProductLanes * 4);
            }
        }
    }
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p)
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
            store_products(sums + p * kMaxChannels + v * kProductLanes, sum[p][v]);
}

// Channels for themselves, 32 at a time; the compiler's own vectors.
constexpr Index kStrip = 32;
typedef Byte Strip __attribute__((vector_size(kStrip)));
typedef std::int8_t SignedStrip __attribute__((vector_size(kStrip)));
typedef std::uint16_t WideStrip __attribute__((vector_size(2 * kStrip)));
typedef std::int16_t SignedWideStrip __attribute__((vector_size(2 * kStrip)));
typedef std::int32_t SumStrip __attribute__((vector_size(4 * kStrip)));
typedef std::int64_t WideSumStrip __attribute__((vector_size(8 * kStrip)));

inline Strip larger(Strip a, Strip b) { return a > b ? a : b; }
inline Strip smaller(Strip a, Strip b) { return a < b ? a : b; }

// Adds term(byte of the window, weight) over the taps, in the narrow type `Narrow` where a chunk of them fits.
template <typename Narrow, Index Chunk, typename Term>
inline void channel_sums(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                         const Byte* weight, Index weight_row, std::int64_t* sums, Term term) {
    for (Index p = 0; p < positions; ++p, sums += kMaxChannels)
        for (Index c = 0; c < channels; c += kStrip) {
            const Byte* source = x[p] + first + c;
            const Byte* w = weight + first + c;
            SumStrip total = {};
            for (Index begin = 0; begin < taps.count; begin += Chunk) {
                const Index end = begin + Chunk < taps.count ? begin + Chunk : taps.count;
                Narrow sum = {};
                for (Index t = begin; t < end; ++t, w += weight_row) sum += term(source + taps.offsets[t], w);
                total += __builtin_convertvector(sum, SumStrip);
            }
            const WideSumStrip wide = __builtin_convertvector(total, WideSumStrip);
            __builtin_memcpy(sums + c, &wide, sizeof wide);
        }
}

void depthwise_adder(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                     const Byte* weight, Index weight_row, std::int64_t* sums) {
    channel_sums<WideStrip, kDepthwiseTaps>(
        x, positions, taps, first, channels, weight, weight_row, sums, [](const Byte* value, const Byte* w) {
            const Strip a = load<Strip>(value), b = load<Strip>(w);
            return __builtin_convertvector(larger(a, b) - smaller(a, b), WideStrip);
        });
}

void depthwise_convolution(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                           const Byte* weight, Index weight_row, std::int64_t* sums) {
    channel_sums<SignedWideStrip, 1>(
        x, positions, taps, first, channels, weight, weight_row, sums, [](const Byte* value, const Byte* w) {
            return __builtin_convertvector(load<Strip>(value), SignedWideStrip) *
                   __builtin_convertvector(load<SignedStrip>(w), SignedWideStrip);  // at most 255 * 128
        });
}

void window_sums(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels, const Byte*,
                 Index, std::int64_t* sums) {
    channel_sums<WideStrip, kDepthwiseTaps>(
        x, positions, taps, first, channels, x[0], 0, sums,
        [](const Byte* value, const Byte*) { return __builtin_convertvector(load<Strip>(value), WideStrip); });
}

void window_largest(const Byte* x, const Index* taps, Index count, Index channels, Byte* out) {
    for (Index c = 0; c < channels; c += kStrip) {
        Strip best = {};
        for (Index t = 0; t < count; ++t) best = larger(best, load<Strip>(x + taps[t] + c));
        __builtin_memcpy(out + c, &best, channels - c < kStrip ? channels - c : kStrip);
    }
}

// Requantisation: several channels of one position in 64-bit lanes. The product takes the lanes' low 32 bits.
#if defined(__AVX512BW__)

constexpr Index kWide = 8;
typedef std::int64_t Wide __attribute__((vector_size(64)));
inline Wide product(Wide a, Wide b) { return (Wide)_mm512_mul_epi32((__m512i)a, (__m512i)b); }
inline Wide widen(const Byte* p) { return (Wide)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(load<std::int64_t>(p))); }
inline std::uint64_t narrow(Wide codes) { return _mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)codes)); }
inline std::uint64_t saturate(Wide codes) { return _mm_cvtsi128_si64(_mm512_cvtusepi64_epi8((__m512i)codes)); }

#elif defined(__AVX2__)

constexpr Index kWide = 4;
typedef std::int64_t Wide __attribute__((vector_size(32)));
inline Wide product(Wide a, Wide b) { return (Wide)_mm256_mul_epi32((__m256i)a, (__m256i)b); }
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
inline Wide widen(const Byte* p) { return *p; }
inline std::uint64_t narrow(Wide code) { return code; }

#endif

#if !defined(__AVX512BW__)
inline std::uint64_t saturate(Wide codes) {
    const Wide most = 255 - Wide{};
    return narrow(codes < most ? codes : most);
}
#endif

template <bool HasResidual, bool HasExponent>
void requantise_channels(const std::int64_t* sums, Index positions, Index channel, Index count, const Factors& factors,
                         const Byte* const* residual, Byte* const* out) {
    const Wide multiplier = load<Wide>(factors.multiplier + channel), offset = load<Wide>(factors.offset + channel);
    const Wide shift = load<Wide>(factors.shift + channel), levels = factors.levels - Wide{};
    const Wide exponent = HasExponent ? load<Wide>(factors.exponent + channel) : Wide{};
    const Wide added = HasResidual ? load<Wide>(factors.residual + channel) : Wide{};
    for (Index p = 0; p < positions; ++p, sums += kMaxChannels) {
        Wide total = product(load<Wide>(sums), multiplier) + offset;
        if constexpr (HasResidual) total += product(widen(residual[p] + channel), added);
        total = (total > 0 ? total : Wide{}) >> shift;
        std::uint64_t bytes;
        if constexpr (HasExponent)
            bytes = narrow((total < levels ? total : levels) << exponent);
        else
            bytes = saturate(total);
        if (count >= kWide)
            __builtin_memcpy(out[p] + channel, &bytes, kWide);
        else
            __builtin_memcpy(out[p] + channel, &bytes, count);
    }
}

void requantise(const std::int64_t* sums, Index positions, Index first, Index channels, const Factors& factors,
                const Byte* const* residual, Byte* const* out) {
    const auto carry_out = factors.residual ? factors.exponent ? requantise_channels<true, true> : requantise_channels<true, false>
                           : factors.exponent ? requantise_channels<false, true>
                                              : requantise_channels<false, false>;
    for (Index c = 0; c < channels; c += kWide)
        carry_out(sums + c, positions, first + c, channels - c, factors, residual, out);
}

// Every operation is rounded to fp32 by itself (-ffp-contract=off), as in the reference.
void quantise(const float* x, Index x_stride, Index width, Index channels, float reciprocal, const float* shift, Byte* out) {
    for (Index c = 0; c < channels; ++c)
        for (Index i = 0; i < width; ++i) {
            const float code = x[c * x_stride + i] * reciprocal + shift[c];  // truncation is floor from 0 on
            out[i * channels + c] = code > 0.0f ? code < 255.0f ? Byte(code) : Byte{255} : Byte{0};
        }
}

template <int Vectors, int Positions>
void fill(IntegerKernels& table) {
    table.adder[Vectors][Positions] = adder_tile<Vectors, Positions>;
    if constexpr (Vectors <= kProductVectors)
        table.convolution[Vectors][Positions] = convolution_tile<Vectors, Positions>;
    if constexpr (Positions > 1)
        fill<Vectors, Positions - 1>(table);
    else if constexpr (Vectors > 1)
        fill<Vectors - 1, kPositions>(table);
}

}  // namespace

IntegerKernels ADDERKIT_INTEGER_KERNELS() {
    IntegerKernels table = {};
    table.positions = kPositions;
    table.adder_shape = {kLanes, kVectors, 8};
    table.convolution_shape = {kProductLanes, kProductVectors, 4};
    fill<kVectors, kPositions>(table);
    table.depthwise_adder = depthwise_adder;
    table.depthwise_convolution = depthwise_convolution;
    table.window_sums = window_sums;
    table.window_largest = window_largest;
    table.requantise = requantise;
    table.quantise = quantise;
    return table;
}

}  // namespace adderkit
