// A step made ready: its window as runs of contiguous bytes, its weights packed for the tiles of one instruction set.
#pragma once

#include "network.h"

namespace adderkit {

inline Index ceil_div(Index value, Index unit) { return (value + unit - 1) / unit; }

struct Step {
    StepSizes sizes;
    Kind kind;
    bool by_channel;             // depthwise or pooling: channels are summed each for itself
    Shape shape;                 // of the tiles of filters
    Index tile_channels;
    std::vector<Index> offsets;  // of the runs, [groups][runs], from the pixel that padding 0 would begin at
    Index runs, run_length;
    Bytes weight;                // packed
    Index packed_run;            // steps of `shape.bytes` bytes that a run takes
    StepFactors factors;
    bool plain;                  // codes are whole bytes: 255 is the largest, and none is shifted

    Index group_filters() const { return sizes.filters / sizes.groups; }
    Index tiles_per_group() const { return by_channel ? ceil_div(sizes.filters, tile_channels)
                                                      : ceil_div(group_filters(), tile_channels); }
    Index tiles() const { return by_channel ? tiles_per_group() : sizes.groups * tiles_per_group(); }
    Index terms() const { return runs * run_length; }  // of one output
    Index group_lanes() const { return ceil_div(group_filters(), shape.lanes) * shape.lanes; }  // filters with padding
    Index filter_bytes() const { return runs * packed_run * shape.bytes; }                     // packed, of one filter
};

// weight is [filters][kernel_h][kernel_w][channels / groups], or null for pooling and rescaling.
Step make_step(const StepSizes& sizes, const Activation& input, const IntegerKernels& kernels, const Byte* weight,
               StepFactors factors);

}  // namespace adderkit
