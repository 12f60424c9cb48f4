// The register tiles, which kernels.cpp provides once for each instruction set.
#pragma once

#include <cstdint>

namespace adderkit {

using Index = std::int64_t;

constexpr int kMaxRows = 8;

struct Kernels {
    Index rows;  // filters (or channels) in a full tile
    Index tile;  // positions in a tile
    // By number of rows: out[row][position] = -sum_k |x[offsets[k] + position] - weight[k][row]|.
    void (*forward[kMaxRows + 1])(const float* x, const Index* offsets, const float* weight, Index terms, float* out,
                                  Index out_stride);
    // out[row][position] = sum over taps and filters of grad * HardTanh(weight - x).
    void (*input_grad[kMaxRows + 1])(const float* x, Index x_stride, const float* grad, Index grad_stride,
                                     const Index* offsets, Index taps, const float* weight, Index filters, float* out,
                                     Index out_stride);
};

Kernels baseline_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace adderkit
