// Forward and input gradient of the adder convolution in fp32. This file is compiled once for each instruction set,
// with ADDERKIT_KERNELS naming its table; the vectors are the compiler's own, so the same code works for SSE, AVX2,
// AVX-512 and NEON.
//
// Everything here but the table at the end has internal linkage, and nothing of the standard library is instantiated:
// a shared inline function compiled here for AVX-512 might be the copy that the linker keeps for all.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace adderkit {
namespace {

// Rows of a tile, chosen so that sums (and for the gradient the input) stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kFilters = 8, kChannels = 4, kChannelVectors = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kFilters = 4, kChannels = 4, kChannelVectors = 1;
#else
constexpr int kLanes = 4, kFilters = 4, kChannels = 2, kChannelVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float))));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float))));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
// Subtracting zero changes no number, so this is a plain broadcast; adding zero would turn -0 into 0.
inline Vector splat(float value) { return value - Vector{}; }

// Loops over a tile must be unrolled, or the compiler keeps sums in memory.
#define ADDERKIT_UNROLL _Pragma("GCC unroll 16")

// CPUs add and compare in some ports, and multiply-add in others. Multiplying by a 1 that the compiler cannot see moves an
// addition to the latter; the result is the same to the bit.
inline Vector opaque_one() {
    Vector one = splat(1.0f);
#if defined(__FMA__)
    __asm__ volatile("" : "+x"(one));
#endif
    return one;
}

#if defined(__FMA__)
inline Vector add_fused(Vector a, Vector b, Vector one) { return a * one + b; }
#else
inline Vector add_fused(Vector a, Vector b, Vector) { return a + b; }
#endif

// max(v, w) and v - w for one w. Compilers load a w that is used by two vectors once, by an instruction that occupies an
// arithmetic port of AVX-512; as an operand in memory it is free.

// The result for a NaN does not matter: the driver does without these kernels then.
inline Vector larger(Vector v, const float& w) {
#if defined(__AVX512F__)
    Vector result;
    __asm__("vmaxps %2%{1to16%}, %1, %0" : "=v"(result) : "v"(v), "m"(w));
    return result;
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps((__m256)v, (__m256)splat(w));
#elif defined(__SSE2__)
    return (Vector)_mm_max_ps((__m128)v, (__m128)splat(w));
#elif defined(__ARM_NEON)
    return (Vector)vmaxq_f32((float32x4_t)v, (float32x4_t)splat(w));
#else
    const Vector other = splat(w);
    return v > other ? v : other;
#endif
}

inline Vector difference(Vector v, const float& w) {
#if defined(__AVX512F__)
    Vector result;
    __asm__("vsubps %2%{1to16%}, %1, %0" : "=v"(result) : "v"(v), "m"(w));
    return result;
#else
    return v - splat(w);
#endif
}

inline Vector difference_fused(Vector v, const float& w, Vector one) {
#if defined(__AVX512F__)
    __asm__("vfnmadd132ps %2%{1to16%}, %1, %0" : "+v"(one) : "v"(v), "m"(w));
    return one;
#elif defined(__FMA__)
    return v - splat(w) * one;
#else
    return v - splat(w);
#endif
}

// Operations of hard_tanh in the ports that compare. With one, every other difference goes there too; with two, none.
#if defined(__AVX512DQ__)
constexpr int kHardTanhs = 1;
#else
constexpr int kHardTanhs = 2;
#endif

// -1, v or 1; of a NaN, anything. Compilers make compare and blend of the plain form.
inline Vector hard_tanh(Vector v) {
#if defined(__AVX512DQ__)
    // The smaller magnitude of v and 1, with the sign of v.
    return (Vector)_mm512_range_ps((__m512)v, _mm512_set1_ps(1.0f), 0x2);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(_mm256_set1_ps(-1.0f), (__m256)v));
#elif defined(__SSE2__)
    return (Vector)_mm_min_ps(_mm_set1_ps(1.0f), _mm_max_ps(_mm_set1_ps(-1.0f), (__m128)v));
#else
    const Vector low = splat(-1.0f), high = splat(1.0f);
    const Vector above = low > v ? low : v;
    return high < above ? high : above;
#endif
}

// A magnitude of 2^115 or more, infinite or NaN carries into the sign.
constexpr std::uint32_t kMagnitude = 0x7fffffff, kCarry = 0x80000000 - ((115 + 127) << 23);

bool moderate(const float* values, Index count) {
    Bits found = {};
    Index i = 0;
    for (; i + kLanes <= count; i += kLanes) found |= ((Bits)load(values + i) & kMagnitude) + kCarry;
    for (; i < count; ++i) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, values + i, sizeof bits);
        found[0] |= (bits & kMagnitude) + kCarry;
    }
    std::uint32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= found[lane];
    return any >> 31 == 0;
}

void sum_windows(const float* x, const Index* offsets, Index terms, Index positions, float* sums) {
    constexpr int vectors = 4;
    for (Index first = 0; first < terms; first += kChunk, sums += kBlock) {
        const Index end = first + kChunk < terms ? first + kChunk : terms;
        for (Index q = 0; q < positions; q += vectors * kLanes) {
            Vector sum[vectors] = {};
            for (Index k = first; k < end; ++k)
                for (int v = 0; v < vectors; ++v) sum[v] += load(x + offsets[k] + q + v * kLanes);
            for (int v = 0; v < vectors; ++v) store(sums + q + v * kLanes, sum[v]);
        }
    }
}

// |x - w| = 2 max(x, w) - x - w: the loop has two operations per term, and what it leaves out is the same for all filters
// (the sum of x) or all positions (that of w). All three sums run over a chunk in the same order, so that equal x and w
// give exactly 0.
template <int Rows, int Vectors>
void forward_tile(const float* x, const Index* offsets, const float* weight, Index terms, const float* sums, float* out) {
    const Vector one = opaque_one();
    for (Index first = 0; first < terms; first += kChunk, sums += kBlock, weight += Rows) {
        const Index end = first + kChunk < terms ? first + kChunk : terms;
        Vector sum[Rows][Vectors] = {};
        for (Index k = first; k < end; ++k, weight += Rows) {
            Vector value[Vectors];
            ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) value[v] = load(x + offsets[k] + v * kLanes);
            ADDERKIT_UNROLL for (int r = 0; r < Rows; ++r)
                ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
                    sum[r][v] = add_fused(larger(value[v], weight[r]), sum[r][v], one);
        }
        ADDERKIT_UNROLL for (int r = 0; r < Rows; ++r)
            ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) {
                float* target = out + r * kBlock + v * kLanes;
                Vector total = splat(weight[r]) + load(sums + v * kLanes) - 2.0f * sum[r][v];
                if (first > 0) total += load(target);
                // Rounding may leave a distance below zero.
                store(target, end == terms ? (Vector)(total > 0.0f ? splat(0.0f) : total) : total);
            }
    }
}

template <int Rows>
void forward(const float* x, const Index* offsets, const float* weight, Index terms, const float* sums, Index positions,
             float* out) {
    // Few rows leave registers free for positions.
    constexpr int vectors = Rows <= kFilters / 4 ? 8 : Rows <= kFilters / 2 ? 4 : 2;
    for (Index q = 0; q < positions; q += vectors * kLanes)
        forward_tile<Rows, vectors>(x + q, offsets, weight, terms, sums + q, out + q);
}

template <int Rows, int Vectors>
void grad_tile(const float* x, Index x_stride, const float* grad, Index grad_stride, const Index* offsets, Index taps,
               const float* weight, Index filters, float* out) {
    const Vector one = opaque_one();
    Vector sum[Rows][Vectors] = {};
    Vector value[Rows][Vectors];
    ADDERKIT_UNROLL for (int r = 0; r < Rows; ++r)
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) value[r][v] = load(x + r * x_stride + v * kLanes);
    for (Index tap = 0; tap < taps; ++tap) {
        const float* shifted = grad - offsets[tap];
        for (Index o = 0; o < filters; ++o, weight += Rows, shifted += grad_stride) {
            Vector slope[Vectors];
            ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) slope[v] = load(shifted + v * kLanes);
            ADDERKIT_UNROLL for (int r = 0; r < Rows; ++r)
                ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) {
                    const bool fused = kHardTanhs > 1 || (r + v) % 2;
                    const Vector t = fused ? difference_fused(value[r][v], weight[r], one) : difference(value[r][v], weight[r]);
                    sum[r][v] -= slope[v] * hard_tanh(t);
                }
        }
    }
    ADDERKIT_UNROLL for (int r = 0; r < Rows; ++r)
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) store(out + r * kBlock + v * kLanes, sum[r][v]);
}

template <int Rows>
void input_grad(const float* x, Index x_stride, const float* grad, Index grad_stride, const Index* offsets, Index taps,
                const float* weight, Index filters, Index positions, float* out) {
    constexpr int vectors = Rows <= kChannels / 2 ? 2 * kChannelVectors : kChannelVectors;
    for (Index q = 0; q < positions; q += vectors * kLanes)
        grad_tile<Rows, vectors>(x + q, x_stride, grad + q, grad_stride, offsets, taps, weight, filters, out + q);
}

// Adds one function for each number of rows up to a full tile; the others stay null.
template <int Rows>
void fill(Kernels& table) {
    table.forward[Rows] = forward<Rows>;
    if constexpr (Rows <= kChannels) table.input_grad[Rows] = input_grad<Rows>;
    if constexpr (Rows > 1) fill<Rows - 1>(table);
}

}  // namespace

Kernels ADDERKIT_KERNELS() {
    Kernels table = {};
    table.filters = kFilters;
    table.channels = kChannels;
    table.moderate = moderate;
    table.window_sums = sum_windows;
    fill<kFilters>(table);
    return table;
}

}  // namespace adderkit
