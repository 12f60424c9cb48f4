// Highest rate of this CPU's arithmetic units: the inner operations of the adder kernels and of a convolution on registers
// alone. Prints giga-terms per second on all threads: forward, input gradient, multiply-add, differences of bytes.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
typedef __m512 Vector;
#define REGISTER(value) "+v"(value)
constexpr int kLanes = 16;
static Vector all(float v) { return _mm512_set1_ps(v); }
static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
static Vector hard_tanh(Vector a) { return _mm512_range_ps(a, all(1), 2); }
static Vector difference(Vector a, Vector b, Vector one, int i) { return i % 2 ? _mm512_fmsub_ps(a, one, b) : a - b; }
static Vector add_differences(Vector sum, Vector x, Vector w) {
    return (Vector)_mm512_add_epi64((__m512i)sum, _mm512_sad_epu8((__m512i)x, (__m512i)w));
}
static Vector add_differences_as_floats(Vector sum, Vector x, Vector w) {
    return (Vector)_mm512_add_pd((__m512d)sum, (__m512d)_mm512_sad_epu8((__m512i)x, (__m512i)w));
}
#else
typedef __m256 Vector;
#define REGISTER(value) "+x"(value)
constexpr int kLanes = 8;
static Vector all(float v) { return _mm256_set1_ps(v); }
static Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static Vector hard_tanh(Vector a) { return _mm256_min_ps(_mm256_max_ps(a, all(-1)), all(1)); }
static Vector difference(Vector a, Vector b, Vector one, int) { return _mm256_fmsub_ps(a, one, b); }
static Vector add_differences(Vector sum, Vector x, Vector w) {
    return (Vector)_mm256_add_epi64((__m256i)sum, _mm256_sad_epu8((__m256i)x, (__m256i)w));
}
static Vector add_differences_as_floats(Vector sum, Vector x, Vector w) {
    return (Vector)_mm256_add_pd((__m256d)sum, (__m256d)_mm256_sad_epu8((__m256i)x, (__m256i)w));
}
#endif

// kSums independent sums: enough to hide the latency, few enough for the registers.
template <int kSums, typename Step>
static double rate_of(Step step) {
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        constexpr long steps = 2000000;
        const auto started = std::chrono::steady_clock::now();
#pragma omp parallel
        {
            Vector sums[kSums], x = all(0.5f), one = all(1.0f);
            for (int i = 0; i < kSums; ++i) sums[i] = all(0.1f * i);
            for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 16
                for (int i = 0; i < kSums; ++i) {
                    __asm__ volatile("" : REGISTER(x), REGISTER(one));  // a new operand every time
                    sums[i] = step(sums[i], x, one, i);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) __asm__ volatile("" : REGISTER(sums[i]));
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
        const double terms = double(steps) * kSums * kLanes * omp_get_max_threads();
        if (terms / seconds.count() > best) best = terms / seconds.count();
    }
    return best / 1e9;
}

template <typename Step>
static double rate(Step step) {
    return std::max({rate_of<8>(step), rate_of<10>(step), rate_of<12>(step)});
}

int main() {
    const Vector w = all(0.25f);
    const double forward = rate([&](Vector sum, Vector x, Vector one, int) { return multiply_add(larger(x, w), one, sum); });
    const double grad = rate([&](Vector sum, Vector x, Vector one, int i) {
        return multiply_add(hard_tanh(difference(w, x, one, i)), x, sum);
    });
    const double product = rate([&](Vector sum, Vector x, Vector, int) { return multiply_add(x, w, sum); });
    const double differences =
        std::max(rate([&](Vector sum, Vector x, Vector, int) { return add_differences(sum, x, w); }),
                 rate([&](Vector sum, Vector x, Vector, int) { return add_differences_as_floats(sum, x, w); }));
    std::printf("%.2f %.2f %.2f %.2f\n", forward, grad, product, differences * sizeof(float));  // 4 bytes in a lane
}
