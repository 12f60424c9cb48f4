// A step prepared for execution: its window as runs of contiguous bytes, its weights packed for one instruction set.
#pragma once

#include "network.h"

namespace adderkit {

inline Index ceil_div(Index value, Index unit) { return (value + unit - 1) / unit; }

struct Step {
    StepConfig config;
    bool by_channel;             // depthwise or pooling: each channel is summed separately
    Shape shape;                 // of the tiles of filters
    Index tile_channels;
    std::vector<Index> offsets;  // of the runs, [groups][runs], from the window's first pixel
    Index runs, run_length;
    Bytes weight;                // packed
    Index packed_run;            // iterations of `shape.bytes` bytes in a run
    StepFactors factors;
    bool plain;                  // codes are whole bytes: quant_max is 255, and none is shifted

    Index group_filters() const { return config.filters / config.groups; }
    Index tiles_per_group() const { return by_channel ? ceil_div(config.filters, tile_channels)
                                                      : ceil_div(group_filters(), tile_channels); }
    Index tiles() const { return by_channel ? tiles_per_group() : config.groups * tiles_per_group(); }
    Index filter_values() const { return config.terms * runs * run_length; }  // differences or products of one output
    Index group_lanes() const { return ceil_div(group_filters(), shape.lanes) * shape.lanes; }  // filters with padding
    Index filter_bytes() const { return config.terms * runs * packed_run * shape.bytes; }      // packed, of one filter
};

// weight is [filters][terms][kernel_h][kernel_w][channels / groups], or null for pooling and rescaling.
Step make_step(const StepConfig& config, const Activation& input, const IntegerKernels& kernels, const Byte* weight,
               StepFactors factors);

}  // namespace adderkit
