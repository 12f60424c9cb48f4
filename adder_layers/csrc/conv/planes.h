// Phase planes: the layout in which every kernel tap of a convolution reads contiguous memory.
//
// The padded input of a stride (sh, sw) convolution is split into sh * sw planes, plane (a, b) holding the pixels
// (r * sh + a, t * sw + b). A tap (i, j) then belongs to one plane, and the windows of all output positions read
// that plane at one constant offset: output position q = (n * rows + oh) * columns + ow reads plane[q + offset].
// So neither im2col nor packing of windows is needed, for any stride, padding or dilation; the price is that the last
// few positions of each row and image are computed and then dropped. Where both sides are padded, a row's zeros on the
// right are also the next row's zeros on the left.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

namespace adderkit {

// Sizes and strides of one call; strides are in elements and arbitrary.
struct Problem {
    Index batch, channels, height, width;  // input [N, C, H, W]
    Index levels;                          // distances that are summed, each with half the factor of the one before
    Index filters, kernel_h, kernel_w;     // weight [levels, O, C / groups, kh, kw], contiguous
    Index out_h, out_w;
    Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    Index x_stride[4];  // input and its gradient, which has the same layout
    Index y_stride[4];  // output, or its gradient

    Index group_channels() const { return channels / groups; }
    Index group_filters() const { return filters / groups; }
    Index taps() const { return kernel_h * kernel_w; }
    Index terms() const { return group_channels() * taps(); }
    Index level_size() const { return filters * terms(); }  // weights of a level
};

struct Phase {
    Index row, column;             // (a, b)
    std::vector<Index> taps;       // indices i * kernel_w + j of the taps that read this plane
    std::vector<Index> offsets;    // of those taps within the plane
};

// Layout of the planes of a group of images.
struct Planes {
    Index rows = 0, columns = 0;   // of one image in one plane
    std::vector<Phase> phases;     // only those that a tap reads
    std::vector<Index> tap_phase;  // phase of each tap, and its offset there
    std::vector<Index> tap_offset;
    Index images = 1;              // images in a plane, one after the other
    Index largest_offset = 0;
    Index beyond = 0;              // number of zeros that are read after the end of the last plane

    Index plane() const { return images * rows * columns; }
    Index count() const { return static_cast<Index>(phases.size()); }
};

// Vectors may read this many elements after the last position.
constexpr Index kMargin = 128;

// How many of a phase's `count` rows (or columns) are padding, before and after the pixels t * stride + phase - pad.
inline std::pair<Index, Index> padding_of(Index phase, Index count, Index size, Index stride, Index pad) {
    const Index begin = std::clamp<Index>((pad - phase + stride - 1) / stride, 0, count);
    const Index end = std::clamp<Index>((size + pad - phase + stride - 1) / stride, begin, count);
    return {begin, count - end};
}

inline Planes make_planes(const Problem& p, Index bytes) {
    Planes planes;
    planes.rows = p.out_h + (p.kernel_h - 1) * p.dilation_h / p.stride_h;
    planes.columns = p.out_w + (p.kernel_w - 1) * p.dilation_w / p.stride_w;
    // Every output position needs an element of its own.
    Index shared_rows = planes.rows - p.out_h, shared_columns = planes.columns - p.out_w;
    for (Index i = 0; i < p.kernel_h; ++i) {
        for (Index j = 0; j < p.kernel_w; ++j) {
            const Index row = i * p.dilation_h % p.stride_h, column = j * p.dilation_w % p.stride_w;
            auto found = std::find_if(planes.phases.begin(), planes.phases.end(),
                                      [&](const Phase& f) { return f.row == row && f.column == column; });
            if (found == planes.phases.end()) {
                planes.phases.push_back({row, column, {}, {}});
                found = planes.phases.end() - 1;
                const auto [top, bottom] = padding_of(row, planes.rows, p.height, p.stride_h, p.pad_h);
                const auto [left, right] = padding_of(column, planes.columns, p.width, p.stride_w, p.pad_w);
                shared_rows = std::min({shared_rows, top, bottom});
                shared_columns = std::min({shared_columns, left, right});
            }
            found->taps.push_back(i * p.kernel_w + j);
            planes.tap_phase.push_back(found - planes.phases.begin());
        }
    }
    // Zeros to the right of a row are those to the left of the next, and zeros below an image those above the next.
    planes.rows -= shared_rows;
    planes.columns -= shared_columns;
    planes.beyond = shared_rows * planes.columns + shared_columns;
    for (Phase& phase : planes.phases)
        for (Index tap : phase.taps)
            phase.offsets.push_back(tap / p.kernel_w * p.dilation_h / p.stride_h * planes.columns +
                                    tap % p.kernel_w * p.dilation_w / p.stride_w);
    planes.tap_offset.resize(p.taps());
    for (const Phase& phase : planes.phases)
        for (std::size_t t = 0; t < phase.taps.size(); ++t) planes.tap_offset[phase.taps[t]] = phase.offsets[t];
    planes.largest_offset = *std::max_element(planes.tap_offset.begin(), planes.tap_offset.end());
    const Index image = p.channels * planes.count() * planes.rows * planes.columns * Index(sizeof(float));
    planes.images = std::clamp<Index>(bytes / std::max<Index>(image, 1), 1, std::max<Index>(p.batch, 1));
    return planes;
}

// Fills one row of one image, all channels and phases: pixels inside the input are copied, those outside are zero.
inline void fill_input_row(const Problem& p, const Planes& planes, const float* x, Index first_image, Index image,
                           Index row, float* out) {
    const float* source = x + (first_image + image) * p.x_stride[0];
    for (Index f = 0; f < planes.count(); ++f) {
        const Index y = row * p.stride_h + planes.phases[f].row - p.pad_h;
        const Index shift = planes.phases[f].column - p.pad_w;
        // Columns t with 0 <= t * stride + shift < width.
        const Index begin = std::clamp<Index>((-shift + p.stride_w - 1) / p.stride_w, 0, planes.columns);
        const Index end = std::clamp<Index>((p.width - shift + p.stride_w - 1) / p.stride_w, begin, planes.columns);
        for (Index c = 0; c < p.channels; ++c) {
            float* target = out + (c * planes.count() + f) * planes.plane() + (image * planes.rows + row) * planes.columns;
            if (y < 0 || y >= p.height) {
                std::fill(target, target + planes.columns, 0.0f);
                continue;
            }
            const float* line = source + c * p.x_stride[1] + y * p.x_stride[2] + shift * p.x_stride[3];
            const Index step = p.stride_w * p.x_stride[3];
            std::fill(target, target + begin, 0.0f);
            if (step == 1) {
                std::copy(line + begin, line + end, target + begin);
            } else {
                for (Index t = begin; t < end; ++t) target[t] = line[t * step];
            }
            std::fill(target + end, target + planes.columns, 0.0f);
        }
    }
}

// Fills one row of the output's gradient, all filters, on the same grid; positions that are not part of the output are zero.
inline void fill_grad_row(const Problem& p, const Planes& planes, const float* grad, Index first_image, Index image,
                          Index row, float* out) {
    for (Index o = 0; o < p.filters; ++o) {
        float* target = out + o * planes.plane() + (image * planes.rows + row) * planes.columns;
        const Index end = row < p.out_h ? p.out_w : 0;
        const float* line = grad + (first_image + image) * p.y_stride[0] + o * p.y_stride[1] + row * p.y_stride[2];
        for (Index t = 0; t < end; ++t) target[t] = line[t * p.y_stride[3]];
        std::fill(target + end, target + planes.columns, 0.0f);
    }
}

}  // namespace adderkit
