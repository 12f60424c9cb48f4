// A quantized network as a list of steps over one arena of bytes; adder_layers/integer/plan.py has the formulas.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace adderkit {

// Memory aligned to cache lines, so that vectors of a line's size do not cross two of them.
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

// Bytes [images][height + 2 halo][width + 2 halo][channels] in the arena; the halo holds the zero point of each channel.
struct Activation {
    Index channels, height, width, halo_rows, halo_columns;
    Index offset;  // in an arena for one image; n times as large for n images
    std::vector<Byte> zero_point;

    Index row() const { return (width + 2 * halo_columns) * channels; }
    Index image() const { return (height + 2 * halo_rows) * row(); }
    Index origin() const { return halo_rows * row() + halo_columns * channels; }
};

enum class Kind : Index { adder, convolution, window_sum, window_largest, linear };

// What one step computes. Activations are numbered; output is -1 for logits, residual -1 if nothing is added. The window of
// a linear step is its whole input. Only the weights of adder steps have several terms.
struct StepConfig {
    Kind kind;
    Index input, output, residual, filters, groups, terms, quant_max;
    Index kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Requantization by output channel: int64 where plan.py has narrower types, so that they are loaded as they are used.
// scale_exponent is empty where all are 0, residual where nothing is added.
struct StepFactors {
    std::vector<std::int64_t> multiplier, offset, shift, scale_exponent, residual;
};

struct Step;

class Network {
  public:
    // An arena for one image has `arena_bytes` bytes. Kernels are those of one instruction set.
    Network(IntegerKernels kernels, std::vector<Activation> activations, Index arena_bytes);
    ~Network();

    // Appends a step, which must not happen after the first run. weight is
    // [filters][terms][kernel_h][kernel_w][channels / groups] and is copied; null for pooling and rescaling.
    void add(const StepConfig& config, const Byte* weight, StepFactors factors);

    const Activation& input() const { return activations_[0]; }
    Index step_count() const;
    Index weight_size(const StepConfig& config) const;  // elements
    bool ends_in_logits() const;                        // else the last step writes bytes
    Index output_size() const;                          // elements for one image

    // Images are [N][H][W][C] bytes, or [N][C][H][W] floats that are divided by the scale first. Writes logits
    // (int32 [N][classes]) or bytes [N][H][W][C]. Any number of threads may call it at once. Unless it is null, seconds
    // receives the time of reading the images and then that of every step.
    struct Images {
        const Byte* bytes;    // one of the two is null
        const float* floats;
        float scale_reciprocal;
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
    const Index arena_bytes_;
    std::vector<Step> steps_;
    std::vector<float> quantize_shift_;  // zero point + 1/2 of the images' channels
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Bytes>> idle_;  // arenas of earlier calls, so that memory is not allocated anew each time
};

}  // namespace adderkit
