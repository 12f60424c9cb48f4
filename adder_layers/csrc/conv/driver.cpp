// The loops around the kernels: planes are filled, blocks of positions and rows (filters or channels) are handed to
// threads, and results are written to the output. Compiled once for all machines.
#include "driver.h"

#include <omp.h>

#include <cmath>
#include <memory>

namespace adderkit {
namespace {

constexpr Index kPlaneBytes = 2 << 20;  // planes of a group of images: about a core's share of the last-level cache
constexpr Index kTasksPerThread = 4;    // fewer leave threads idle at the end, more read the input more often
constexpr Index kTermsPerGrab = 1 << 16;  // terms of the tasks that a thread takes from the queue at once

using Buffer = std::unique_ptr<float[]>;

// Uninitialized memory with zeros at both ends: before the element at `margin`, and after the next `used` elements.
Buffer buffer(Index margin, Index used, Index beyond) {
    Buffer memory(new float[margin + used + beyond + kMargin]);
    std::fill_n(memory.get(), margin, 0.0f);
    std::fill_n(memory.get() + margin + used, beyond + kMargin, 0.0f);
    return memory;
}

// How work is divided: groups x blocks of positions x parts of a group's rows.
struct Tasks {
    Index blocks, parts, part_rows, count, grab;

    // A full register tile has `tile` rows; one position and row has `terms` terms.
    Tasks(Index groups, Index rows, Index tile, Index positions, Index terms, int threads) {
        blocks = (positions + kBlock - 1) / kBlock;
        const Index tiles = (rows + tile - 1) / tile;
        const Index wanted = (kTasksPerThread * threads + groups * blocks - 1) / std::max<Index>(groups * blocks, 1);
        parts = threads == 1 ? 1 : std::clamp<Index>(wanted, 1, tiles);
        part_rows = (tiles + parts - 1) / parts * tile;
        parts = (rows + part_rows - 1) / part_rows;
        count = groups * blocks * parts;
        grab = std::max<Index>(kTermsPerGrab / std::max<Index>(terms * std::min(part_rows, rows) * kBlock, 1), 1);
    }
};

// Packs one tile of weights [O, C / groups, kh, kw] as [term][rows], with the sums of the weights after each chunk of terms.
void pack_filters(const float* weight, Index terms, Index rows, float* packed) {
    for (Index first = 0; first < terms; first += kChunk) {
        const Index end = std::min(terms, first + kChunk);
        float sums[kMaxRows] = {};
        for (Index k = first; k < end; ++k)
            for (Index r = 0; r < rows; ++r) sums[r] += *packed++ = weight[r * terms + k];
        packed = std::copy_n(sums, rows, packed);
    }
}

// Packs one tile of channels of a phase as [tap][filter][rows]; `weight` is that of the tile's first channel.
void pack_channels(const Problem& p, const Phase& phase, const float* weight, Index rows, float* packed) {
    for (Index tap : phase.taps)
        for (Index o = 0; o < p.group_filters(); ++o)
            for (Index r = 0; r < rows; ++r) *packed++ = weight[(o * p.group_channels() + r) * p.taps() + tap];
}

// Calls copy(position in the block, image, row, first column, end column) for each piece of a row in a block.
template <typename Copy>
void for_rows(const Planes& planes, Index begin, Index end, Copy copy) {
    for (Index q = begin; q < end;) {
        const Index line = q / planes.columns, column = q % planes.columns;
        const Index stop = std::min(planes.columns, column + end - q);
        copy(q - begin, line / planes.rows, line % planes.rows, column, stop);
        q += stop - column;
    }
}

// Adds a level's tile of results to the sum over levels: sum[r][t] += factor * tile[r][t].
void add_tile(const float* tile, Index rows, Index count, float factor, float* sum) {
    for (Index r = 0; r < rows; ++r)
        for (Index t = 0; t < count; ++t) sum[r * kBlock + t] += factor * tile[r * kBlock + t];
}

// target[r * row_step + t * step] = tile[r][t]; the inner loop follows the smaller step.
void write_tile(const float* tile, Index rows, Index count, float* target, Index row_step, Index step) {
    if (step <= row_step) {
        for (Index r = 0; r < rows; ++r)
            for (Index t = 0; t < count; ++t) target[r * row_step + t * step] = tile[r * kBlock + t];
    } else {
        for (Index t = 0; t < count; ++t)
            for (Index r = 0; r < rows; ++r) target[r * row_step + t * step] = tile[r * kBlock + t];
    }
}

void write_output(const Problem& p, const Planes& planes, const float* tile, Index begin, Index end, Index first_image,
                  Index filter, Index rows, float* y) {
    for_rows(planes, begin, end, [&](Index q, Index image, Index row, Index column, Index stop) {
        if (row >= p.out_h || column >= p.out_w) return;
        float* target = y + (first_image + image) * p.y_stride[0] + filter * p.y_stride[1] + row * p.y_stride[2] +
                        column * p.y_stride[3];
        write_tile(tile + q, rows, std::min(stop, p.out_w) - column, target, p.y_stride[1], p.y_stride[3]);
    });
}

void write_grad(const Problem& p, const Planes& planes, const Phase& phase, const float* tile, Index begin, Index end,
                Index first_image, Index channel, Index rows, float* result) {
    const auto [left, right] = padding_of(phase.column, planes.columns, p.width, p.stride_w, p.pad_w);
    for_rows(planes, begin, end, [&, left = left, right = right](Index q, Index image, Index row, Index column, Index stop) {
        const Index y = row * p.stride_h + phase.row - p.pad_h;
        const Index from = std::max(column, left), until = std::min(stop, planes.columns - right);
        if (y < 0 || y >= p.height || from >= until) return;
        float* target = result + (first_image + image) * p.x_stride[0] + channel * p.x_stride[1] + y * p.x_stride[2] +
                        (from * p.stride_w + phase.column - p.pad_w) * p.x_stride[3];
        write_tile(tile + q + from - column, rows, until - from, target, p.x_stride[1], p.stride_w * p.x_stride[3]);
    });
}

}  // namespace

bool forward(const Problem& p, const Kernels& kernels, const float* x, const float* weight, float* y, int threads) {
    const Planes planes = make_planes(p, kPlaneBytes);
    const Index phases = planes.count(), plane = planes.plane(), terms = p.terms();
    const Index group_filters = p.group_filters(), packed_row = terms + chunks(terms);
    Buffer input = buffer(0, p.channels * phases * plane, planes.beyond);
    Buffer packed = buffer(0, p.levels * p.filters * packed_row, 0);
    std::vector<Index> offsets(terms);
    for (Index k = 0; k < terms; ++k)
        offsets[k] = (k / p.taps() * phases + planes.tap_phase[k % p.taps()]) * plane + planes.tap_offset[k % p.taps()];
    const Index tiles = (group_filters + kernels.filters - 1) / kernels.filters;
    bool moderate = kernels.moderate(weight, p.levels * p.level_size());
#pragma omp parallel num_threads(threads) reduction(&& : moderate)
    {
#pragma omp for schedule(static)
        for (Index task = 0; task < p.levels * p.groups * tiles; ++task) {
            const Index o = task % tiles * kernels.filters, filter = task / tiles * group_filters + o;  // of all levels
            pack_filters(weight + filter * terms, terms, std::min(kernels.filters, group_filters - o),
                         packed.get() + filter * packed_row);
        }
        float tile[kMaxRows * kBlock], level_tile[kMaxRows * kBlock];
        std::vector<float> sums(chunks(terms) * kBlock);
        for (Index first = 0; first < p.batch; first += planes.images) {
            const Index images = std::min(planes.images, p.batch - first);
            const Index positions = ((images - 1) * planes.rows + p.out_h - 1) * planes.columns + p.out_w;
            const Tasks tasks(p.groups, group_filters, kernels.filters, positions, p.levels * terms, threads);
#pragma omp for schedule(static)
            for (Index line = 0; line < images * planes.rows; ++line)
                fill_input_row(p, planes, x, first, line / planes.rows, line % planes.rows, input.get());
#pragma omp for schedule(static) nowait
            for (Index c = 0; c < p.channels; ++c)
                moderate &= kernels.moderate(input.get() + c * phases * plane, phases * plane);
#pragma omp for schedule(dynamic, tasks.grab)
            for (Index task = 0; task < tasks.count; ++task) {
                const Index g = task / (tasks.blocks * tasks.parts), part = task % tasks.parts;
                const Index begin = task / tasks.parts % tasks.blocks * kBlock, end = std::min(positions, begin + kBlock);
                const float* source = input.get() + g * p.group_channels() * phases * plane + begin;
                kernels.window_sums(source, offsets.data(), terms, end - begin, sums.data());
                const Index stop = std::min(group_filters, (part + 1) * tasks.part_rows);
                for (Index o = part * tasks.part_rows; o < stop; o += kernels.filters) {
                    const Index rows = std::min(kernels.filters, stop - o), filter = g * group_filters + o;
                    for (Index level = 0; level < p.levels; ++level) {
                        kernels.forward[rows](source, offsets.data(), packed.get() + (level * p.filters + filter) * packed_row,
                                              terms, sums.data(), end - begin, level ? level_tile : tile);
                        if (level) add_tile(level_tile, rows, end - begin, std::ldexp(1.0f, -int(level)), tile);
                    }
                    write_output(p, planes, tile, begin, end, first, filter, rows, y);
                }
            }
        }
    }
    return moderate;
}

bool input_grad(const Problem& p, const Kernels& kernels, const float* grad, const float* x, const float* weight,
                float* result, int threads) {
    const Planes planes = make_planes(p, kPlaneBytes);
    const Index phases = planes.count(), plane = planes.plane(), margin = planes.largest_offset;
    const Index group_channels = p.group_channels(), group_filters = p.group_filters();
    Buffer input = buffer(0, p.channels * phases * plane, 0);
    Buffer slopes = buffer(margin, p.filters * plane, 0);
    Buffer packed = buffer(0, p.levels * p.level_size(), 0);
    // First packed weight of each phase, which has those of all channels.
    std::vector<Index> phase_start;
    for (Index f = 0, start = 0; f < phases; start += p.channels * group_filters * Index(planes.phases[f++].taps.size()))
        phase_start.push_back(start);
    const Index tiles = (group_channels + kernels.channels - 1) / kernels.channels;
    bool moderate = kernels.moderate(weight, p.levels * p.level_size());
#pragma omp parallel num_threads(threads) reduction(&& : moderate)
    {
#pragma omp for schedule(static)
        for (Index task = 0; task < p.levels * phases * p.groups * tiles; ++task) {
            const Index c = task % tiles * kernels.channels, g = task / tiles % p.groups;
            const Index f = task / tiles / p.groups % phases, level = task / tiles / p.groups / phases * p.level_size();
            const Phase& phase = planes.phases[f];
            pack_channels(p, phase, weight + level + (g * group_filters * group_channels + c) * p.taps(),
                          std::min(kernels.channels, group_channels - c),
                          packed.get() + level + phase_start[f] +
                              (g * group_channels + c) * group_filters * Index(phase.taps.size()));
        }
        float tile[kMaxRows * kBlock], level_tile[kMaxRows * kBlock];
        for (Index first = 0; first < p.batch; first += planes.images) {
            const Index images = std::min(planes.images, p.batch - first);
            const Index positions = images * planes.rows * planes.columns;
            const Tasks tasks(p.groups, group_channels, kernels.channels, positions, p.levels * group_filters * p.taps(), threads);
#pragma omp for schedule(static)
            for (Index line = 0; line < images * planes.rows; ++line) {
                fill_input_row(p, planes, x, first, line / planes.rows, line % planes.rows, input.get());
                fill_grad_row(p, planes, grad, first, line / planes.rows, line % planes.rows, slopes.get() + margin);
            }
#pragma omp for schedule(static) nowait
            for (Index c = 0; c < p.channels; ++c)
                moderate &= kernels.moderate(input.get() + c * phases * plane, phases * plane);
#pragma omp for schedule(dynamic, tasks.grab)
            for (Index task = 0; task < tasks.count; ++task) {
                const Index g = task / (tasks.blocks * tasks.parts), part = task % tasks.parts;
                const Index begin = task / tasks.parts % tasks.blocks * kBlock, end = std::min(positions, begin + kBlock);
                const float* source = slopes.get() + margin + g * group_filters * plane + begin;
                const Index stop = std::min(group_channels, (part + 1) * tasks.part_rows);
                for (Index c = part * tasks.part_rows; c < stop; c += kernels.channels) {
                    const Index rows = std::min(kernels.channels, stop - c), channel = g * group_channels + c;
                    for (Index f = 0; f < phases; ++f) {
                        const Phase& phase = planes.phases[f];
                        const Index taps = Index(phase.taps.size());
                        for (Index level = 0; level < p.levels; ++level) {
                            kernels.input_grad[rows](
                                input.get() + (channel * phases + f) * plane + begin, phases * plane, source, plane,
                                phase.offsets.data(), taps,
                                packed.get() + level * p.level_size() + phase_start[f] + channel * group_filters * taps,
                                group_filters, end - begin, level ? level_tile : tile);
                            if (level) add_tile(level_tile, rows, end - begin, std::ldexp(1.0f, -int(level)), tile);
                        }
                        write_grad(p, planes, phase, tile, begin, end, first, channel, rows, result);
                    }
                }
            }
        }
    }
    return moderate;
}

}  // namespace adderkit
