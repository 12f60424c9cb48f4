// Forward and input gradient of the adder convolution in fp32. This file is compiled once for each instruction set,
// with ADDERKIT_ISA naming it; the vectors are the compiler's own, so the same lines serve SSE, AVX2, AVX-512 and NEON.
//
// Everything here but the table at the end has internal linkage, and nothing of the standard library is instantiated:
// a shared inline function compiled here for AVX-512 might be the copy that the linker keeps for all.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace adderkit {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kVectors = 2;                 // vectors of positions in a register tile

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float))));
typedef std::int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
// Subtracting zero changes no number, so this is a plain broadcast; adding zero would not be (it turns -0 into 0).
inline Vector splat(float value) { return value - Vector{}; }

inline Vector magnitude(Vector v) {
    return (Vector)((Mask)v & 0x7fffffff);
}

// -1, v or 1. The order of the operands lets a NaN through; compilers make compare and blend of the plain form.
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

// -sum_k |x[k] - w[k]| for Rows filters and kLanes * kVectors positions. weight is [terms][Rows].
template <int Rows>
void forward_tile(const float* x, const Index* offsets, const float* weight, Index terms, float* out, Index out_stride) {
    Vector sum[Rows][kVectors] = {};
    // Multiplying by an opaque 1 lets a fused multiply-subtract take the difference, so that the adders, of which the
    // CPU has fewer than arithmetic ports in all, are left to the sum. The result is the same to the bit.
    Vector one = splat(1.0f);
    __asm__ volatile("" : "+x"(one));
    for (Index k = 0; k < terms; ++k) {
        Vector value[kVectors];
        for (int v = 0; v < kVectors; ++v) value[v] = load(x + offsets[k] + v * kLanes);
        for (int r = 0; r < Rows; ++r) {
            const Vector w = splat(weight[k * Rows + r]);
            for (int v = 0; v < kVectors; ++v) sum[r][v] += magnitude(value[v] * one - w);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, -sum[r][v]);
}

// sum over taps and filters of grad * HardTanh(w - x) for Rows channels and kLanes * kVectors positions of one plane.
// weight is [taps][filters][Rows].
template <int Rows>
void grad_tile(const float* x, Index x_stride, const float* grad, Index grad_stride, const Index* offsets,
               Index taps, const float* weight, Index filters, float* out, Index out_stride) {
    Vector sum[Rows][kVectors] = {};
    Vector value[Rows][kVectors];
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectors; ++v) value[r][v] = load(x + r * x_stride + v * kLanes);
    for (Index tap = 0; tap < taps; ++tap) {
        const float* shifted = grad - offsets[tap];
        for (Index o = 0; o < filters; ++o, weight += Rows) {
            Vector slope[kVectors];
            for (int v = 0; v < kVectors; ++v) slope[v] = load(shifted + o * grad_stride + v * kLanes);
            for (int r = 0; r < Rows; ++r)
                for (int v = 0; v < kVectors; ++v) sum[r][v] += slope[v] * hard_tanh(splat(weight[r]) - value[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v]);
}

// One function for each number of rows, 1 to kRows; the others stay null.
template <int Rows>
void fill(Kernels& table) {
    table.forward[Rows] = forward_tile<Rows>;
    table.input_grad[Rows] = grad_tile<Rows>;
    if constexpr (Rows > 1) fill<Rows - 1>(table);
}

}  // namespace

Kernels ADDERKIT_KERNELS() {
    Kernels table = {};
    table.rows = kRows;
    table.tile = kLanes * kVectors;
    fill<kRows>(table);
    return table;
}

}  // namespace adderkit
