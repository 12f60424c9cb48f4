// A quantized network as flat steps over one arena of bytes; adder_layers/integer/plan.py has the formulas.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace adderkit {

// Memory that begins with a cache line, so that vectors of a line's size do not lie across two.
template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};
    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
using Bytes = std::vector<Byte, LineAllocator<Byte>>;

// Bytes [images][height + 2 halo][width + 2 halo][channels] in the arena; the halo holds `zero`, byte by channel.
struct Activation {
    Index channels, height, width, halo_rows, halo_columns;
    Index offset;  // in an arena for one image; for n images, n times as far
    std::vector<Byte> zero;

    Index row() const { return (width + 2 * halo_columns) * channels; }
    Index image() const { return (height + 2 * halo_rows) * row(); }
    Index origin() const { return halo_rows * row() + halo_columns * channels; }
};

enum class Kind : Index { adder, convolution, window_sum, window_largest, linear };

// Sizes of one step, in the order in which adder_layers/integer/cpu_engine.py gives them. The classifier's window is its whole
// input.
struct StepSizes {
    Index kind, input, output, residual, filters, groups, levels;
    Index kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// By output channel, int64 where plan.py has narrower types, so that they load as they are used.
struct StepFactors {
    std::vector<std::int64_t> multiplier, offset, shift, exponent, residual;
};

struct Step;

class Network {
  public:
    // An arena for one image has `bytes` bytes. Kernels are those of one instruction set.
    Network(IntegerKernels kernels, std::vector<Activation> activations, Index bytes);
    ~Network();

    // weight is [filters][kernel_h][kernel_w][channels / groups] and is copied; only before the first run.
    void add(const StepSizes& sizes, const Byte* weight, StepFactors factors);

    // Images are [N][H][W][C] bytes, or [N][C][H][W] floats that are divided by the scale first. Writes logits
    // (int32 [N][classes]) or bytes. Any number of threads may call it at once. seconds gets the time of every step,
    // and before them that of reading the images, unless it is null.
    struct Images {
        const Byte* bytes;
        const float* floats;
        float reciprocal;
    };
    void run(const Images& images, Index count, void* output, int threads, double* seconds) const;

  private:
    struct Pass;

    void read_images(const Pass& pass, const Images& images) const;
    void sum_step(const Pass& pass, const Step& step) const;
    void largest_step(const Pass& pass, const Step& step) const;
    void write_output(const Pass& pass, Byte* output) const;
    void fill_halo(const Pass& pass, const Activation& target, Index image, Index begin, Index end) const;
    std::unique_ptr<Bytes> borrow(Index bytes) const;

    const IntegerKernels kernels_;
    const std::vector<Activation> activations_;
    const Index bytes_;
    std::vector<Step> steps_;
    std::vector<float> quantize_shift_;  // zero + 1/2 of the images' channels
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Bytes>> idle_;  // of earlier calls, so that their memory is not new each time
};

}  // namespace adderkit
