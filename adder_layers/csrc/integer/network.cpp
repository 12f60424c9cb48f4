// The loops around the integer kernels: blocks of lines and channels are handed to threads. Compiled once for all machines.
#include "network.h"

#include <omp.h>
#if defined(ADDERKIT_X86)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "step.h"

namespace adderkit {
namespace {

constexpr Index kPassBytes = 48 << 20;      // arena of the images that go through the network together
constexpr Index kTaskPositions = 128;       // output pixels of a task: their input stays in a core's second-level cache
constexpr Index kTasksPerThread = 4;        // fewer leave threads idle at a step's end
constexpr Index kTaskTerms = 1 << 17;       // smaller tasks cost more to hand out than they save

}  // namespace

// One run through the network of some of the images.
struct Network::Pass {
    Byte* arena;
    Index images;
    std::int32_t* logits;

    Byte* data(const Activation& activation) const { return arena + images * activation.offset; }
};

namespace {

// How a step's work is divided: blocks of output lines (of all images, one after the other) x parts of the tiles of channels.
struct Tasks {
    Index lines, block_lines, blocks, part_tiles, parts;

    Tasks(Index lines, Index width, Index tiles, Index terms, int threads) : lines(lines) {
        const Index wanted = kTasksPerThread * threads;
        blocks = std::clamp<Index>(ceil_div(lines * width, kTaskPositions), 1, lines);
        block_lines = ceil_div(lines, blocks);
        blocks = ceil_div(lines, block_lines);
        const Index worth = std::max<Index>(block_lines * width * terms * tiles / kTaskTerms, 1);
        parts = threads == 1 ? 1 : std::clamp<Index>(ceil_div(wanted, blocks), 1, std::min(tiles, worth));
        part_tiles = ceil_div(tiles, parts);
        parts = ceil_div(tiles, part_tiles);
    }
    Index count() const { return blocks * parts; }
};

// First bytes of the windows of a block of positions, of their outputs, and of what is added to them.
struct Positions {
    std::vector<const Byte*> input, residual;
    std::vector<Byte*> output;

    void resize(Index count) {
        input.resize(count);
        residual.resize(count);
        output.resize(count);
    }
};

// The kernels may add sums as denormal numbers (vectors.h), which a thread may be set to flush to zero.
class DefaultFloatingPoint {
#if defined(ADDERKIT_X86)
  public:
    DefaultFloatingPoint() { _mm_setcsr(0x1f80); }  // the default of a process: nothing is flushed, nothing traps
    ~DefaultFloatingPoint() { _mm_setcsr(before_); }

  private:
    const unsigned before_ = _mm_getcsr();
#endif
};

void fill_pixels(Byte* out, const std::vector<Byte>& pixel, Index count) {
    for (Index i = 0; i < count; ++i, out += pixel.size()) std::memcpy(out, pixel.data(), pixel.size());
}

}  // namespace

Network::Network(IntegerKernels kernels, std::vector<Activation> activations, Index arena_bytes)
    : kernels_(kernels), activations_(std::move(activations)), arena_bytes_(arena_bytes) {
    for (Byte zero_point : input().zero_point) quantize_shift_.push_back(float(zero_point) + 0.5f);
}

Network::~Network() = default;

void Network::add(const StepConfig& config, const Byte* weight, StepFactors factors) {
    for (const Index written_or_added : {config.output, config.residual})
        if (written_or_added >= 0) activations_.at(written_or_added);
    steps_.push_back(make_step(config, activations_.at(config.input), kernels_, weight, std::move(factors)));
}

Index Network::step_count() const { return Index(steps_.size()); }

Index Network::weight_size(const StepConfig& config) const {
    const Index channels = activations_.at(config.input).channels / config.groups;
    return config.filters * config.terms * config.kernel_h * config.kernel_w * channels;
}

bool Network::ends_in_logits() const { return steps_.back().config.kind == Kind::linear; }

Index Network::output_size() const {
    const StepConfig& last = steps_.back().config;
    if (last.kind == Kind::linear) return last.filters;
    const Activation& a = activations_[last.output];
    return a.height * a.width * a.channels;
}

std::unique_ptr<Bytes> Network::borrow(Index bytes) const {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto& arena : idle_)
            if (Index(arena->size()) >= bytes) {
                auto found = std::move(arena);
                std::swap(arena, idle_.back());
                idle_.pop_back();
                return found;
            }
        if (!idle_.empty()) idle_.pop_back();  // too small: a larger one takes its place
    }
    return std::make_unique<Bytes>(bytes);
}

void Network::run(const Images& images, Index count, void* output, int threads, double* seconds) const {
    const Index together = std::clamp<Index>(kPassBytes / arena_bytes_, 1, count);
    auto arena = borrow(together * arena_bytes_ + kSlack);
    const Activation& first = activations_[0];
    const Step& last = steps_.back();
    const bool logits = ends_in_logits();
    for (Index begin = 0; begin < count; begin += together) {
        Pass pass{arena->data(), std::min(together, count - begin), nullptr};
        Images part = images;
        const Index done = begin * first.channels * first.height * first.width;
        (images.bytes ? (void)(part.bytes += done) : (void)(part.floats += done));
        if (logits) pass.logits = static_cast<std::int32_t*>(output) + begin * last.config.filters;
#pragma omp parallel num_threads(threads)
        {
            [[maybe_unused]] DefaultFloatingPoint mode;
            double started = omp_get_wtime();
            const auto note = [&](std::size_t slot) {
                if (!seconds || omp_get_thread_num() != 0) return;
                const double now = omp_get_wtime();
                seconds[slot] += now - started;
                started = now;
            };
            read_images(pass, part);
            note(0);
            for (std::size_t s = 0; s < steps_.size(); ++s) {
                if (steps_[s].config.kind == Kind::window_largest)
                    largest_step(pass, steps_[s]);
                else
                    sum_step(pass, steps_[s]);
                note(s + 1);
            }
            if (!logits) {
                const Activation& result = activations_[last.config.output];
                write_output(pass, static_cast<Byte*>(output) + begin * result.channels * result.height * result.width);
            }
        }
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(arena));
}

// Fills the halo to the left and right of the lines [begin, end) of one image, and above and below the image.
void Network::fill_halo(const Pass& pass, const Activation& target, Index image, Index begin, Index end) const {
    if (target.halo_rows == 0 && target.halo_columns == 0) return;
    Byte* base = pass.data(target) + image * target.image();
    const Index columns = target.width + 2 * target.halo_columns, edge = (columns - target.halo_columns) * target.channels;
    if (begin == 0) fill_pixels(base, target.zero_point, target.halo_rows * columns);
    for (Index y = begin; y < end; ++y) {
        Byte* line = base + (target.halo_rows + y) * target.row();
        fill_pixels(line, target.zero_point, target.halo_columns);
        fill_pixels(line + edge, target.zero_point, target.halo_columns);
    }
    if (end == target.height)
        fill_pixels(base + (target.halo_rows + target.height) * target.row(), target.zero_point, target.halo_rows * columns);
}

void Network::read_images(const Pass& pass, const Images& images) const {
    const Activation& a = activations_[0];
    const Index pixels = a.height * a.width;
#pragma omp for schedule(static)
    for (Index line = 0; line < pass.images * a.height; ++line) {
        const Index image = line / a.height, y = line % a.height;
        fill_halo(pass, a, image, y, y + 1);
        Byte* out = pass.data(a) + image * a.image() + a.origin() + y * a.row();
        if (images.bytes)
            std::memcpy(out, images.bytes + line * a.width * a.channels, a.width * a.channels);
        else
            kernels_.quantize(images.floats + image * a.channels * pixels + y * a.width, pixels, a.width, a.channels,
                              images.scale_reciprocal, quantize_shift_.data(), out);
    }
}

namespace {

// Calls visit(image, first row, end row) for the pieces of images among the lines of a block.
template <typename Visit>
void for_images(Index begin, Index end, Index height, Visit visit) {
    for (Index line = begin; line < end;) {
        const Index image = line / height, row = line % height, stop = std::min(height, row + end - line);
        visit(image, row, stop);
        line += stop - row;
    }
}

// Sums and requantization (or logits) of a block of positions for the tiles [first, end).
class Block {
  public:
    Block(const IntegerKernels& kernels, const Step& step, const Positions& at, Index count)
        : kernels_(kernels), step_(step), at_(at), count_(count),
          height_(step.by_channel ? kMaxPositions : kernels.positions),
          factors_{step.factors.multiplier.data(), step.factors.offset.data(), step.factors.shift.data(),
                   step.plain ? nullptr : step.factors.scale_exponent.data(),
                   step.factors.residual.empty() ? nullptr : step.factors.residual.data(),
                   step.config.quant_max} {}

    void bytes(Index tile) const {
        const auto [first, channels] = span(tile);
        const bool whole = channels % step_.shape.lanes == 0;
        Byte spare[kMaxPositions][kMaxChannels];  // kernels write whole vectors
        Byte* spares[kMaxPositions];
        for (Index i = 0; i < kMaxPositions; ++i) spares[i] = spare[i] - first;
        for (Index p = 0; p < count_; p += height_) {
            const Index positions = std::min(height_, count_ - p);
            const Target target{factors_, first, at_.residual.data() + p, whole ? at_.output.data() + p : spares};
            write(tile, channels, p, positions, target);
            for (Index i = 0; i < (whole ? 0 : positions); ++i)
                std::memcpy(at_.output[p + i] + first, spare[i], channels);
        }
    }

    // logits[position][filter]
    void logits(Index tile, std::int32_t* out) const {
        const auto [first, channels] = span(tile);
        for (Index p = 0; p < count_; p += height_) {
            alignas(64) std::int64_t sums[kMaxPositions * kMaxChannels];
            const Index positions = std::min(height_, count_ - p);
            sum(tile, first, channels, p, positions, sums);
            for (Index i = 0; i < positions; ++i)
                for (Index c = 0; c < channels; ++c) {
                    const Index o = first + c;
                    const std::int64_t total = sums[i * kMaxChannels + c] * factors_.multiplier[o] + factors_.offset[o];
                    out[(p + i) * step_.config.filters + o] = static_cast<std::int32_t>(total >> factors_.shift[o]);
                }
        }
    }

  private:
    std::pair<Index, Index> span(Index tile) const {
        const Index per_group = step_.tiles_per_group(), filters = step_.by_channel ? step_.config.filters : step_.group_filters();
        const Index within = tile % per_group * step_.tile_channels;
        return {tile / per_group * filters + within, std::min(step_.tile_channels, filters - within)};
    }

    Index group(Index tile) const { return step_.by_channel ? 0 : tile / step_.tiles_per_group(); }
    Runs runs(Index tile) const {
        return {step_.offsets.data() + group(tile) * step_.runs, step_.runs, step_.run_length, step_.config.terms};
    }
    const Byte* weight(Index tile) const {
        const Index begin = group(tile) * step_.group_lanes() + tile % step_.tiles_per_group() * step_.tile_channels;
        return step_.weight.data() + begin * step_.filter_bytes();
    }

    void write(Index tile, Index channels, Index p, Index positions, const Target& target) const {
        const Byte* const* x = at_.input.data() + p;
        if (!step_.by_channel && step_.config.kind == Kind::adder) {
            const auto& tiles = kernels_.adder[step_.config.terms > 1];
            tiles[ceil_div(channels, step_.shape.lanes)][positions](x, runs(tile), weight(tile), target);
            return;
        }
        alignas(64) std::int64_t sums[kMaxPositions * kMaxChannels];
        sum(tile, target.first, channels, p, positions, sums);
        kernels_.requantize(sums, positions, channels, target);
    }

    void sum(Index tile, Index first, Index channels, Index p, Index positions, std::int64_t* sums) const {
        const Byte* const* x = at_.input.data() + p;
        if (step_.by_channel) {
            const ChannelSums sum = step_.weight.empty()               ? kernels_.window_sums
                                    : step_.config.kind == Kind::adder ? kernels_.depthwise_adder
                                                                       : kernels_.depthwise_convolution;
            const Index filters = step_.config.filters;
            for (Index term = 0; term < step_.config.terms; ++term) {
                const Byte* weight = step_.weight.data() + term * step_.runs * filters;
                alignas(64) std::int64_t found[kMaxPositions * kMaxChannels];
                sum(x, positions, runs(tile), first, channels, weight, filters, term == 0 ? sums : found);
                for (Index i = 0; i < (term == 0 ? 0 : positions * kMaxChannels); i += kMaxChannels)
                    for (Index c = i; c < i + channels; ++c) sums[c] = 2 * sums[c] + found[c];
            }
        } else {
            kernels_.convolution[ceil_div(channels, step_.shape.lanes)][positions](x, runs(tile), weight(tile), sums);
        }
    }

    const IntegerKernels& kernels_;
    const Step& step_;
    const Positions& at_;
    const Index count_, height_;
    const Factors factors_;
};

}  // namespace

void Network::sum_step(const Pass& pass, const Step& step) const {
    const StepConfig& s = step.config;
    const bool logits = step.config.kind == Kind::linear;
    const Activation& input = activations_[s.input];
    const Activation& output = activations_[logits ? s.input : s.output];
    const Index height = logits ? 1 : output.height, width = logits ? 1 : output.width;
    const Activation* residual = s.residual < 0 ? nullptr : &activations_[s.residual];
    const Tasks tasks(pass.images * height, width, step.tiles(), step.filter_values(), omp_get_num_threads());
    const Index begin_x = input.origin() - s.pad_h * input.row() - s.pad_w * input.channels;
    Positions at;
    at.resize(tasks.block_lines * width);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < tasks.count(); ++task) {
        const Index block = task / tasks.parts, part = task % tasks.parts;
        const Index begin = block * tasks.block_lines, end = std::min(tasks.lines, begin + tasks.block_lines);
        Index count = 0;
        for_images(begin, end, height, [&](Index image, Index row, Index stop) {
            if (part == 0 && !logits) fill_halo(pass, output, image, row, stop);
            for (; row < stop; ++row) {
                const Byte* x = pass.data(input) + image * input.image() + begin_x + row * s.stride_h * input.row();
                Byte* y = pass.data(output) + image * output.image() + output.origin() + row * output.row();
                const Byte* r = residual ? pass.data(*residual) + image * residual->image() + residual->origin() +
                                               row * residual->row()
                                         : nullptr;
                for (Index column = 0; column < width; ++column, ++count) {
                    at.input[count] = x + column * s.stride_w * input.channels;
                    at.output[count] = y + column * output.channels;
                    at.residual[count] = r + (residual ? column * residual->channels : 0);
                }
            }
        });
        const Block work(kernels_, step, at, count);
        const Index stop = std::min(step.tiles(), (part + 1) * tasks.part_tiles);
        for (Index tile = part * tasks.part_tiles; tile < stop; ++tile) {
            if (logits)
                work.logits(tile, pass.logits + begin * s.filters);
            else
                work.bytes(tile);
        }
    }
}

void Network::largest_step(const Pass& pass, const Step& step) const {
    const StepConfig& s = step.config;
    const Activation& input = activations_[s.input];
    const Activation& output = activations_[s.output];
    std::vector<Index> taps(s.kernel_h * s.kernel_w);
#pragma omp for schedule(static)
    for (Index line = 0; line < pass.images * output.height; ++line) {
        const Index image = line / output.height, row = line % output.height;
        fill_halo(pass, output, image, row, row + 1);
        const Byte* x = pass.data(input) + image * input.image() + input.origin();
        Byte* y = pass.data(output) + image * output.image() + output.origin() + row * output.row();
        for (Index column = 0; column < output.width; ++column) {
            Index count = 0;
            for (Index i = 0; i < s.kernel_h; ++i)
                for (Index j = 0; j < s.kernel_w; ++j) {
                    const Index from_row = row * s.stride_h - s.pad_h + i * s.dilation_h;
                    const Index from_column = column * s.stride_w - s.pad_w + j * s.dilation_w;
                    if (from_row >= 0 && from_row < input.height && from_column >= 0 && from_column < input.width)
                        taps[count++] = from_row * input.row() + from_column * input.channels;
                }
            kernels_.window_largest(x, taps.data(), count, input.channels, y + column * output.channels);
        }
    }
}

void Network::write_output(const Pass& pass, Byte* output) const {
    const Activation& a = activations_[steps_.back().config.output];
#pragma omp for schedule(static)
    for (Index line = 0; line < pass.images * a.height; ++line)
        std::memcpy(output + line * a.width * a.channels,
                    pass.data(a) + line / a.height * a.image() + a.origin() + line % a.height * a.row(),
                    a.width * a.channels);
}

}  // namespace adderkit
