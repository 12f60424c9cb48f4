// The inner loops of quantized networks, which kernels.cpp provides once for each instruction set.
#pragma once

#include <cstdint>

namespace adderkit {

using Index = std::int64_t;
using Byte = std::uint8_t;

constexpr Index kMaxPositions = 8;   // output pixels of a tile
constexpr Index kMaxChannels = 64;   // output channels of a tile; rows of sums are this far apart
constexpr Index kMaxVectors = 4;     // vectors of channels of a tile
constexpr Index kSlack = 64;         // bytes (of memory) or channels (of factors) that may be read after the last one
constexpr Index kDepthwiseTaps = 256;  // that many differences of bytes fit into 16 bits

// The bytes of a window, from its pixel (0, 0) on: `count` runs of contiguous bytes, all of the same length. Adder
// tiles read them once for each term of the weights, and double the sums in between.
struct Runs {
    const Index* offsets;
    Index count;
    Index length;
    Index terms;
};

// Requantization by channel, as in adder_layers/integer/plan.py; kSlack more channels may be read.
struct Factors {
    const std::int64_t* multiplier;
    const std::int64_t* offset;
    const std::int64_t* shift;
    const std::int64_t* scale_exponent;  // null where all are 0 and quant_max is 255
    const std::int64_t* residual;  // null if nothing is added
    std::int64_t quant_max;
};

// Destination of a tile's bytes: channels from `first` on at out[p], to which those at residual[p] are added (if any are).
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
// The same where each channel is summed separately: taps are runs of one byte, weights [taps][channels] or null.
using ChannelSums = void (*)(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                             const Byte* weight, Index weight_row, std::int64_t* sums);

// Channels of one vector, and bytes of each in one iteration; weights are [terms][iterations][vectors][lanes][bytes].
struct Shape {
    Index lanes, vectors, bytes;
    Index channels() const { return lanes * vectors; }
};

struct IntegerKernels {
    Index positions;  // of a full tile
    Shape adder_shape, convolution_shape;
    AdderTile adder[2][kMaxVectors + 1][kMaxPositions + 1];    // by whether there are several terms, vectors and positions
    TileSums convolution[kMaxVectors + 1][kMaxPositions + 1];  // by vectors and positions
    ChannelSums depthwise_adder, depthwise_convolution, window_sums;
    void (*window_largest)(const Byte* x, const Index* taps, Index count, Index channels, Byte* out);
    void (*requantize)(const std::int64_t* sums, Index positions, Index channels, const Target& target);
    // clamp(floor(x / scale + zero_point + 1/2), 0, 255) of one row: channels x_stride apart become adjacent bytes.
    void (*quantize)(const float* x, Index x_stride, Index width, Index channels, float reciprocal, const float* shift,
                     Byte* out);
};

IntegerKernels baseline_integer_kernels();
IntegerKernels avx2_integer_kernels();
IntegerKernels avx512_integer_kernels();
IntegerKernels avx512_float_integer_kernels();  // sums are added as doubles (vectors.h)

}  // namespace adderkit
