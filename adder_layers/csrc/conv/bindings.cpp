// The part of the Python extension `_cpu` that computes adder convolutions in fp32. nanobind checks dtype, rank, device
// and contiguity of every tensor, and Problem is built from their shapes and strides.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../isa.h"
#include "driver.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace adderkit {
namespace {

using Pair = std::pair<Index, Index>;  // (height, width)
using Input = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using Weight = nb::ndarray<const float, nb::ndim<5>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;

constexpr double kLargestPlanes = 1LL << 48;  // elements; products of sizes below it do not overflow

const InstructionSets<Kernels>& instruction_sets() {
    static const InstructionSets<Kernels> found = [] {
        InstructionSets<Kernels> sets;
#if defined(ADDERKIT_X86)
        if (runs_avx512()) sets.add("avx512", avx512_kernels());
        if (runs_avx2()) sets.add("avx2", avx2_kernels());
#endif
        sets.add("baseline", baseline_kernels());
        return sets;
    }();
    return found;
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

Index output_size(Index size, Index kernel, Index stride, Index padding, Index dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// `output` is the output [N, O, H', W'] or its gradient.
template <typename Tensor>
Problem problem(const Input& input, const Weight& weight, const Tensor& output, Pair stride, Pair padding, Pair dilation,
                Index groups) {
    Problem p{};
    p.batch = input.shape(0), p.channels = input.shape(1), p.height = input.shape(2), p.width = input.shape(3);
    p.levels = weight.shape(0), p.filters = weight.shape(1), p.kernel_h = weight.shape(3), p.kernel_w = weight.shape(4);
    p.out_h = output.shape(2), p.out_w = output.shape(3);
    std::tie(p.stride_h, p.stride_w) = stride;
    std::tie(p.pad_h, p.pad_w) = padding;
    std::tie(p.dilation_h, p.dilation_w) = dilation;
    p.groups = groups;
    for (int axis = 0; axis < 4; ++axis) {
        p.x_stride[axis] = input.stride(axis);
        p.y_stride[axis] = output.stride(axis);
    }
    require(std::min({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w, groups}) > 0 && std::min(p.pad_h, p.pad_w) >= 0,
            "stride, dilation and groups must be positive, padding not negative");
    require(p.filters % groups == 0 && p.channels == Index(weight.shape(2)) * groups && p.levels > 0,
            "channels, filters, groups and levels do not fit together");
    require(Index(output.shape(0)) == p.batch && Index(output.shape(1)) == p.filters &&
                p.out_h == output_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h) &&
                p.out_w == output_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w),
            "the output does not have the shape of this convolution's output");
    const double rows = double(p.out_h) + double(p.kernel_h - 1) * p.dilation_h;
    const double columns = double(p.out_w) + double(p.kernel_w - 1) * p.dilation_w;
    require(rows * columns * (double(p.channels) * p.taps() + p.filters) < kLargestPlanes,
            "padding and dilation spread an image over more memory than any machine has");
    return p;
}

// The kernel reads the input and writes its gradient through one set of strides; those of an axis of one do not matter.
bool same_layout(const Input& input, const Output& result) {
    for (int axis = 0; axis < 4; ++axis)
        if (input.shape(axis) != result.shape(axis) || (input.shape(axis) > 1 && input.stride(axis) != result.stride(axis)))
            return false;
    return true;
}

}  // namespace

void bind_conv(nb::module_& module) {
    module.def("available", [] { return instruction_sets().names(); });
    module.def(
        "forward",
        [](const std::string& isa, Input input, Weight weight, Output output, Pair stride, Pair padding, Pair dilation,
           Index groups, int threads) {
            const Problem p = problem(input, weight, output, stride, padding, dilation, groups);
            const Kernels& kernels = instruction_sets().pick(isa);
            nb::gil_scoped_release release;
            return forward(p, kernels, input.data(), weight.data(), output.data(), threads);
        },
        "isa"_a, "input"_a.noconvert(), "weight"_a.noconvert(), "output"_a.noconvert(), nb::kw_only(), "stride"_a,
        "padding"_a, "dilation"_a, "groups"_a, "threads"_a);
    module.def(
        "input_grad",
        [](const std::string& isa, Input grad, Input input, Weight weight, Output result, Pair stride, Pair padding,
           Pair dilation, Index groups, int threads) {
            const Problem p = problem(input, weight, grad, stride, padding, dilation, groups);
            require(same_layout(input, result), "the result does not have the input's shape and strides");
            const Kernels& kernels = instruction_sets().pick(isa);
            nb::gil_scoped_release release;
            return input_grad(p, kernels, grad.data(), input.data(), weight.data(), result.data(), threads);
        },
        "isa"_a, "grad"_a.noconvert(), "input"_a.noconvert(), "weight"_a.noconvert(), "result"_a.noconvert(),
        nb::kw_only(), "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "threads"_a);
}

}  // namespace adderkit
