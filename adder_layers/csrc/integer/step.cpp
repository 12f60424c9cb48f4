#include "step.h"

#include <algorithm>

namespace adderkit {
namespace {

constexpr Index kChannelTile = 64;  // channels of a tile of what has no filters
static_assert(kChannelTile <= kMaxChannels);

// Weights of one tile of filters, [runs][steps][filter][bytes]; what is beyond a run's or the filters' end is 0.
void pack_tile(const Step& step, const Byte* weight, Index filters, Index vectors, Byte* packed) {
    const Index bytes = step.shape.bytes, lanes = vectors * step.shape.lanes;
    for (Index r = 0; r < step.runs; ++r)
        for (Index i = 0; i < step.packed_run * bytes; i += bytes)
            for (Index o = 0; o < lanes; ++o)
                for (Index b = 0; b < bytes; ++b, ++packed)
                    *packed = o < filters && i + b < step.run_length
                                  ? weight[(o * step.runs + r) * step.run_length + i + b]
                                  : Byte{0};
}

void pack(Step& step, const Byte* weight) {
    const Index filters = step.group_filters(), terms = step.terms();
    step.packed_run = ceil_div(step.run_length, step.shape.bytes);
    step.weight.resize(step.sizes.groups * step.group_lanes() * step.filter_bytes());
    Byte* packed = step.weight.data();
    for (Index g = 0; g < step.sizes.groups; ++g)
        for (Index o = 0; o < filters; o += step.tile_channels) {
            const Index count = std::min(step.tile_channels, filters - o), vectors = ceil_div(count, step.shape.lanes);
            pack_tile(step, weight + (g * filters + o) * terms, count, vectors, packed);
            packed += vectors * step.shape.lanes * step.filter_bytes();
        }
}

// [taps][channels] of weights [channels][taps], readable kSlack bytes beyond.
void pack_by_channel(Step& step, const Byte* weight) {
    const Index taps = step.runs, channels = step.sizes.filters;
    step.weight.resize(taps * channels + kSlack);
    for (Index c = 0; c < channels; ++c)
        for (Index t = 0; t < taps; ++t) step.weight[t * channels + c] = weight[c * taps + t];
}

// Offsets of the runs of a window in its input; a kernel row is one run where its taps lie side by side.
void find_runs(Step& step, const Activation& input) {
    const StepSizes& s = step.sizes;
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

Step make_step(const StepSizes& sizes, const Activation& input, const IntegerKernels& kernels, const Byte* weight,
               StepFactors factors) {
    Step step{};
    step.sizes = sizes;
    step.kind = static_cast<Kind>(sizes.kind);
    const bool weighted = weight != nullptr, adds = step.kind == Kind::adder;
    const bool depthwise = sizes.groups == input.channels && sizes.groups == sizes.filters;
    step.by_channel = !weighted || (depthwise && sizes.groups > 1);
    step.shape = adds ? kernels.adder_shape : kernels.convolution_shape;
    step.tile_channels = step.by_channel ? kChannelTile : step.shape.channels();
    find_runs(step, input);
    if (weighted && step.by_channel)
        pack_by_channel(step, weight);
    else if (weighted)
        pack(step, weight);
    const auto shifted = [](std::int64_t exponent) { return exponent > 0; };
    step.plain = sizes.levels == 255 && std::none_of(factors.exponent.begin(), factors.exponent.end(), shifted);
    step.factors = std::move(factors);
    for (auto* values : {&step.factors.multiplier, &step.factors.offset, &step.factors.shift, &step.factors.exponent,
                         &step.factors.residual})
        if (!values->empty()) values->resize(values->size() + kSlack);
    return step;
}

}  // namespace adderkit
