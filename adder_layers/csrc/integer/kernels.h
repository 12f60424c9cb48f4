// The inner loops of quantized networks, which integer_kernels.cpp provides once for each instruction set.
#pragma once

#include <cstdint>

namespace adderkit {

using Index = std::int64_t;
using Byte = std::uint8_t;

constexpr Index kMaxPositions = 8;   // output pixels of a tile
constexpr Index kMaxChannels = 64;   // output channels of a tile; rows of sums are this far apart
constexpr Index kMaxVectors = 4;     // vectors of channels of a tile
constexpr Index kSlack = 64;         // bytes (of memory) or channels (of factors) that are read beyond the last one
constexpr Index kDepthwiseTaps = 256;  // so many differences of bytes fit 16 bits

// What a window reads of its pixel (0, 0) and after: `count` runs of contiguous bytes, all of the same length.
struct Runs {
    const Index* offsets;
    Index count;
    Index length;
};

// Requantization by channel, as in adder_layers/integer/plan.py; readable kSlack channels beyond the last.
struct Factors {
    const std::int64_t* multiplier;
    const std::int64_t* offset;
    const std::int64_t* shift;
    const std::int64_t* exponent;  // null where all are 0 and `levels` is 255
    const std::int64_t* residual;  // null for none
    std::int64_t levels;
};

// Where a tile's bytes go: from out[p] + first on, and as far behind residual[p] lie those that are added (if any are).
// Whole vectors of channels are read and written.
struct Target {
    const Factors& factors;
    Index first;
    const Byte* const* residual;
    Byte* const* out;
};

// x[p] is the first byte that position p's window may read.
using AdderTile = void (*)(const Byte* const* x, const Runs& runs, const Byte* weight, const Target& target);
// sums[p * kMaxChannels + channel] is written.
using TileSums = void (*)(const Byte* const* x, const Runs& runs, const Byte* weight, std::int64_t* sums);
// The same for channels that are summed each for itself: taps are runs of one byte, weights [taps][channels] or null.
using ChannelSums = void (*)(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                             const Byte* weight, Index weight_row, std::int64_t* sums);

// Channels of one vector, and bytes of each that one step takes; weights are [steps][vectors][lanes][bytes].
struct Shape {
    Index lanes, vectors, bytes;
    Index channels() const { return lanes * vectors; }
};

struct IntegerKernels {
    Index positions;  // of a full tile
    Shape adder_shape, convolution_shape;
    AdderTile adder[kMaxVectors + 1][kMaxPositions + 1];        // by vectors and positions
    TileSums convolution[kMaxVectors + 1][kMaxPositions + 1];
    ChannelSums depthwise_adder, depthwise_convolution, window_sums;
    void (*window_largest)(const Byte* x, const Index* taps, Index count, Index channels, Byte* out);
    void (*requantize)(const std::int64_t* sums, Index positions, Index channels, const Target& target);
    // clamp(floor(x / scale + zero + 1/2), 0, 255) of one row: channels x_stride apart become bytes side by side.
    void (*quantize)(const float* x, Index x_stride, Index width, Index channels, float reciprocal, const float* shift,
                     Byte* out);
};

IntegerKernels baseline_integer_kernels();
IntegerKernels avx2_integer_kernels();
IntegerKernels avx512_integer_kernels();
IntegerKernels avx512_float_integer_kernels();  // sums added as doubles, see integer_vectors.h

}  // namespace adderkit
