// Kernels of register tiles, which kernels.cpp provides once for each instruction set.
#pragma once

#include <cstdint>

namespace adderkit {

using Index = std::int64_t;

constexpr int kMaxRows = 8;
constexpr Index kBlock = 256;  // most positions of a call; rows of its results are this far apart
constexpr Index kChunk = 256;  // terms of a partial sum, so that rounding errors stay those of short sums

// Functions by number of rows, from 1 to a full tile. Positions are written in whole vectors, up to kBlock. Results are
// those of the formula for moderate x and w; a NaN of w - x is lost in the input gradient, and inf - inf is NaN in the
// forward pass, where the formula has |inf|.
struct Kernels {
    Index filters;   // rows of a full tile of the forward pass
    Index channels;  // rows of a full tile of the input gradient

    // Whether all values are finite, and so far from overflow that sums of a chunk are, too.
    bool (*moderate)(const float* values, Index count);
    // sums[chunk][position] = sum of x[offsets[k] + position] over the terms k of each chunk.
    void (*window_sums)(const float* x, const Index* offsets, Index terms, Index positions, float* sums);
    // out[row][position] = -sum_k |x[offsets[k] + position] - w[row][k]|. weight is [terms][rows], with the sums of the
    // weights, [rows], after each chunk.
    void (*forward[kMaxRows + 1])(const float* x, const Index* offsets, const float* weight, Index terms,
                                  const float* sums, Index positions, float* out);
    // out[row][position] = sum over taps and filters of grad * HardTanh(w - x). weight is [taps][filters][rows].
    void (*input_grad[kMaxRows + 1])(const float* x, Index x_stride, const float* grad, Index grad_stride,
                                     const Index* offsets, Index taps, const float* weight, Index filters,
                                     Index positions, float* out);
};

inline Index chunks(Index terms) { return (terms + kChunk - 1) / kChunk; }

Kernels baseline_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace adderkit
