// The loops around the kernels: planes are filled, blocks of positions and filters are handed to threads, results are
// written where they belong. Compiled once, for any machine.
#include "driver.h"

#include <omp.h>

#include <memory>

namespace adderkit {
namespace {

constexpr Index kBlock = 256;           // positions that share a pass over all filters: their input stays in L2
constexpr Index kPlaneBytes = 2 << 20;  // planes of a group of images: about a core's share of the last-level cache

using Buffer = std::unique_ptr<float[]>;

Buffer buffer(Index size) { return Buffer(new float[size + 2 * kMargin]()); }

// Weights [O, C / groups, kh, kw] of one group as blocks of rows filters: [block][term][rows].
void pack_forward(const Problem& p, Index block, const float* weight, float* packed) {
    const Index terms = p.terms();
    for (Index g = 0; g < p.groups; ++g) {
        for (Index first = 0; first < p.group_filters(); first += block) {
            const Index rows = std::min<Index>(block, p.group_filters() - first);
            const float* source = weight + (g * p.group_filters() + first) * terms;
            for (Index k = 0; k < terms; ++k)
                for (Index r = 0; r < rows; ++r) *packed++ = source[r * terms + k];
        }
    }
}

// The same weights as blocks of rows channels, for each phase: [group][phase][block][tap][filter][rows].
void pack_grad(const Problem& p, const Planes& planes, Index block, const float* weight, float* packed) {
    for (Index g = 0; g < p.groups; ++g)
        for (const Phase& phase : planes.phases)
            for (Index first = 0; first < p.group_channels(); first += block) {
                const Index rows = std::min<Index>(block, p.group_channels() - first);
                for (Index tap : phase.taps)
                    for (Index o = 0; o < p.group_filters(); ++o)
                        for (Index r = 0; r < rows; ++r)
                            *packed++ = weight[((g * p.group_filters() + o) * p.group_channels() + first + r) * p.taps() + tap];
            }
}

// Calls copy(position in the block, image, row, first column, end column) for the pieces of rows in a block.
template <typename Copy>
void for_rows(const Planes& planes, Index begin, Index end, Copy copy) {
    for (Index q = begin; q < end;) {
        const Index line = q / planes.columns, column = q % planes.columns;
        const Index stop = std::min(planes.columns, column + end - q);
        copy(q - begin, line / planes.rows, line % planes.rows, column, stop);
        q += stop - column;
    }
}

void write_output(const Problem& p, const Planes& planes, const float* tile, Index begin, Index end,
                         Index first_image, Index filter, Index rows, float* y) {
    for_rows(planes, begin, end, [&](Index q, Index image, Index row, Index column, Index stop) {
        if (row >= p.out_h) return;
        stop = std::min(stop, p.out_w);
        for (Index r = 0; r < rows; ++r) {
            float* target = y + (first_image + image) * p.y_stride[0] + (filter + r) * p.y_stride[1] + row * p.y_stride[2];
            for (Index t = column; t < stop; ++t) target[t * p.y_stride[3]] = tile[r * kBlock + q + t - column];
        }
    });
}

void write_grad(const Problem& p, const Planes& planes, const Phase& phase, const float* tile, Index begin,
                       Index end, Index first_image, Index channel, Index rows, float* result) {
    for_rows(planes, begin, end, [&](Index q, Index image, Index row, Index column, Index stop) {
        const Index y = row * p.stride_h + phase.row - p.pad_h;
        if (y < 0 || y >= p.height) return;
        for (Index r = 0; r < rows; ++r) {
            float* target = result + (first_image + image) * p.x_stride[0] + (channel + r) * p.x_stride[1] + y * p.x_stride[2];
            for (Index t = column; t < stop; ++t) {
                const Index x = t * p.stride_w + phase.column - p.pad_w;
                if (x >= 0 && x < p.width) target[x * p.x_stride[3]] = tile[r * kBlock + q + t - column];
            }
        }
    });
}

}  // namespace

void forward(const Problem& p, const Kernels& kernels, const float* x, const float* weight, float* y, int threads) {
    Planes planes = make_planes(p, kPlaneBytes);
    const Index terms = p.terms(), phases = planes.count();
    Buffer input = buffer(p.channels * phases * planes.plane());
    Buffer packed = buffer(p.filters * terms);
    pack_forward(p, kernels.rows, weight, packed.get());
    std::vector<Index> offsets(terms);
    for (Index k = 0; k < terms; ++k)
        offsets[k] = (k / p.taps() * phases + planes.tap_phase[k % p.taps()]) * planes.plane() + planes.tap_offset[k % p.taps()];
    for (Index first = 0; first < p.batch; first += planes.images) {
        const Index images = std::min(planes.images, p.batch - first);
        const Index positions = ((images - 1) * planes.rows + p.out_h - 1) * planes.columns + p.out_w;
        const Index blocks = (positions + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (Index line = 0; line < images * planes.rows; ++line)
                fill_input_row(p, planes, x, first, line / planes.rows, line % planes.rows, input.get());
            float tile[kMaxRows * kBlock];
#pragma omp for schedule(dynamic)
            for (Index task = 0; task < p.groups * blocks; ++task) {
                const Index g = task / blocks, begin = task % blocks * kBlock;
                const Index end = std::min(positions, begin + kBlock);
                const float* source = input.get() + g * p.group_channels() * phases * planes.plane();
                for (Index o = 0; o < p.group_filters(); o += kernels.rows) {
                    const Index rows = std::min<Index>(kernels.rows, p.group_filters() - o);
                    const float* filters = packed.get() + (g * p.group_filters() + o) * terms;
                    for (Index q = begin; q < end; q += kernels.tile)
                        kernels.forward[rows](source + q, offsets.data(), filters, terms, tile + q - begin, kBlock);
                    write_output(p, planes, tile, begin, end, first, g * p.group_filters() + o, rows, y);
                }
            }
        }
    }
}

void input_grad(const Problem& p, const Kernels& kernels, const float* grad, const float* x, const float* weight, float* result, int threads) {
    Planes planes = make_planes(p, kPlaneBytes);
    const Index phases = planes.count(), plane = planes.plane(), margin = planes.largest_offset;
    Buffer input = buffer(p.channels * phases * plane);
    Buffer slopes = buffer(margin + p.filters * plane);
    Buffer packed = buffer(p.filters * p.terms());
    pack_grad(p, planes, kernels.rows, weight, packed.get());
    for (Index first = 0; first < p.batch; first += planes.images) {
        const Index images = std::min(planes.images, p.batch - first);
        const Index positions = images * planes.rows * planes.columns;
        const Index blocks = (positions + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (Index line = 0; line < images * planes.rows; ++line) {
                fill_input_row(p, planes, x, first, line / planes.rows, line % planes.rows, input.get());
                fill_grad_row(p, planes, grad, first, line / planes.rows, line % planes.rows, slopes.get() + margin);
            }
            float tile[kMaxRows * kBlock];
#pragma omp for schedule(dynamic)
            for (Index task = 0; task < p.groups * blocks; ++task) {
                const Index g = task / blocks, begin = task % blocks * kBlock;
                const Index end = std::min(positions, begin + kBlock);
                const float* source = slopes.get() + margin + g * p.group_filters() * plane;
                const float* filters = packed.get() + g * p.group_filters() * p.terms();
                for (const Phase& phase : planes.phases) {
                    const Index f = &phase - planes.phases.data();
                    for (Index c = 0; c < p.group_channels(); c += kernels.rows) {
                        const Index rows = std::min<Index>(kernels.rows, p.group_channels() - c);
                        const Index channel = g * p.group_channels() + c;
                        const float* values = input.get() + (channel * phases + f) * plane;
                        for (Index q = begin; q < end; q += kernels.tile)
                            kernels.input_grad[rows](values + q, phases * plane, source + q, plane, phase.offsets.data(),
                                                     Index(phase.taps.size()), filters, p.group_filters(),
                                                     tile + q - begin, kBlock);
                        write_grad(p, planes, phase, tile, begin, end, first, channel, rows, result);
                        filters += Index(phase.taps.size()) * p.group_filters() * rows;
                    }
                }
            }
        }
    }
}

}  // namespace adderkit
