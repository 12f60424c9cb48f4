#include "step.h"

#include <algorithm>

namespace adderkit {
namespace {

constexpr Index kChannelTile = 64;  // channels of a tile of a step by channel
static_assert(kChannelTile <= kMaxChannels);

// Weights of one tile of filters, [terms][runs][iterations][filter][bytes], 0 after the end of a run or of the filters.
void pack_tile(const Step& step, const Byte* weight, Index filters, Index vectors, Byte* packed) {
    const Index bytes = step.shape.bytes, lanes = vectors * step.shape.lanes, runs = step.config.terms * step.runs;
    for (Index r = 0; r < runs; ++r)
        for (Index i = 0; i < step.packed_run * bytes; i += bytes)
            for (Index o = 0; o < lanes; ++o)
                for (Index b = 0; b < bytes; ++b, ++packed)
                    *packed = o < filters && i + b < step.run_length
                                  ? weight[(o * runs + r) * step.run_length + i + b]
                                  : Byte{0};
}

void pack(Step& step, const Byte* weight) {
    const Index filters = step.group_filters();
    step.packed_run = ceil_div(step.run_length, step.shape.bytes);
    step.weight.resize(step.config.groups * step.group_lanes() * step.filter_bytes());
    Byte* packed = step.weight.data();
    for (Index g = 0; g < step.config.groups; ++g)
        for (Index o = 0; o < filters; o += step.tile_channels) {
            const Index count = std::min(step.tile_channels, filters - o), vectors = ceil_div(count, step.shape.lanes);
            pack_tile(step, weight + (g * filters + o) * step.filter_values(), count, vectors, packed);
            packed += vectors * step.shape.lanes * step.filter_bytes();
        }
}

// Transposes weights [channels][terms][taps] to [terms][taps][channels], followed by kSlack bytes that may be read.
void pack_by_channel(Step& step, const Byte* weight) {
    const Index taps = step.config.terms * step.runs, channels = step.config.filters;
    step.weight.resize(taps * channels + kSlack);
    for (Index c = 0; c < channels; ++c)
        for (Index t = 0; t < taps; ++t) step.weight[t * channels + c] = weight[c * taps + t];
}

// Offsets of a window's runs in its input; a kernel row is one run if its taps are adjacent in memory.
void find_runs(Step& step, const Activation& input) {
    const StepConfig& s = step.config;
    const Index channels = step.by_channel ? 1 : input.channels / s.groups;
    const bool joined = !step.by_channel && s.groups == 1 && (s.dilation_w == 1 || s.kernel_w == 1);
    step.run_length = joined ? s.kernel_w * channels : channels;
    step.runs = joined ? s.kernel_h : s.kernel_h * s.kernel_w;
    for (Index g = 0; g < (step.by_channel ? 1 : s.groups); ++g)
        for (Index i = 0; i < s.kernel_h; ++i)
            for (Index j = 0; j < (joined ? 1 : s.kernel_w); ++j)
                step.offsets.push_back(i * s.dilation_h * input.row() + j * s.dilation_w * input.channels + g * channels);
}

}  // namespace

Step make_step(const StepConfig& config, const Activation& input, const IntegerKernels& kernels, const Byte* weight,
               StepFactors factors) {
    Step step{};
    step.config = config;
    const bool weighted = weight != nullptr, adds = config.kind == Kind::adder;
    const bool depthwise = config.groups == input.channels && config.groups == config.filters;
    step.by_channel = !weighted || (depthwise && config.groups > 1);
    step.shape = adds ? kernels.adder_shape : kernels.convolution_shape;
    step.tile_channels = step.by_channel ? kChannelTile : step.shape.channels();
    find_runs(step, input);
    if (weighted && step.by_channel)
        pack_by_channel(step, weight);
    else if (weighted)
        pack(step, weight);
    const auto shifted = [](std::int64_t exponent) { return exponent > 0; };
    step.plain = config.quant_max == 255 && std::none_of(factors.scale_exponent.begin(), factors.scale_exponent.end(), shifted);
    step.factors = std::move(factors);
    for (auto* values : {&step.factors.multiplier, &step.factors.offset, &step.factors.shift, &step.factors.scale_exponent,
                         &step.factors.residual})
        if (!values->empty()) values->resize(values->size() + kSlack);
    return step;
}

}  // namespace adderkit
