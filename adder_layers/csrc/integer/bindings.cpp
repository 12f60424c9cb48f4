// The part of the Python extension `_cpu` that runs quantized networks. adder_layers/integer/check.py has proved that the
// plan's sums fit; shapes and dtypes of all tensors are checked here.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../isa.h"
#include "network.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace adderkit {
namespace {

using Pair = std::pair<Index, Index>;  // (height, width)
template <typename T, std::size_t Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::c_contig, nb::device::cpu>;
using AnyConstArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Int64Array = Array<const std::int64_t, 1>;

const InstructionSets<IntegerKernels>& instruction_sets() {
    static const InstructionSets<IntegerKernels> found = [] {
        InstructionSets<IntegerKernels> sets;
#if defined(ADDERKIT_X86)
        if (runs_avx512_vnni()) {
            const bool amd = __builtin_cpu_is("amd");
            if (amd) sets.add("avx512_float", avx512_float_integer_kernels());
            sets.add("avx512", avx512_integer_kernels());
            if (!amd) sets.add("avx512_float", avx512_float_integer_kernels());  // not measured there
        }
        if (runs_avx2()) sets.add("avx2", avx2_integer_kernels());
#endif
        sets.add("baseline", baseline_integer_kernels());
        return sets;
    }();
    return found;
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

std::vector<std::int64_t> vector_of(const std::optional<Int64Array>& values) {
    if (!values) return {};
    return {values->data(), values->data() + values->size()};
}

void add(Network& network, const StepConfig& config, const std::optional<AnyConstArray>& weight, StepFactors factors) {
    const bool weighted = config.kind == Kind::adder || config.kind == Kind::convolution || config.kind == Kind::linear;
    require(weighted == weight.has_value(), "adder, convolution and linear steps have a weight, others have none");
    if (weight) {
        const auto expected = config.kind == Kind::adder ? nb::dtype<std::uint8_t>() : nb::dtype<std::int8_t>();
        require(weight->dtype() == expected, "weight is not uint8 (adder) or int8 (convolution, linear)");
        require(Index(weight->size()) == network.weight_size(config), "weight does not have the size of the step's window");
    }
    const std::size_t filters = config.kind == Kind::window_largest ? 0 : config.filters;
    const bool may_lack_exponents = filters == 0 || config.kind == Kind::linear || config.quant_max == 255;
    require(factors.multiplier.size() == filters && factors.offset.size() == filters && factors.shift.size() == filters &&
                factors.scale_exponent.size() == (may_lack_exponents && factors.scale_exponent.empty() ? 0 : filters) &&
                factors.residual.size() == (config.residual < 0 ? 0 : filters),
            "requantization factors do not have one value for each output channel");
    network.add(config, weight ? static_cast<const Byte*>(weight->data()) : nullptr, std::move(factors));
}

void run(const Network& network, const Network::Images& images, Index count, const AnyArray& output, int threads,
         const std::optional<Array<double, 1>>& seconds) {
    require(output.dtype() == (network.ends_in_logits() ? nb::dtype<std::int32_t>() : nb::dtype<std::uint8_t>()),
            "output is not int32 (logits) or uint8 (codes)");
    require(Index(output.size()) == count * network.output_size(), "output does not have the size of the last step's result");
    require(!seconds || Index(seconds->size()) == network.step_count() + 1, "seconds does not have one value more than steps");
    nb::gil_scoped_release release;
    network.run(images, count, output.data(), threads, seconds ? seconds->data() : nullptr);
}

void bind_parts(nb::module_& module) {
    nb::enum_<Kind>(module, "Kind")
        .value("adder", Kind::adder)
        .value("convolution", Kind::convolution)
        .value("window_sum", Kind::window_sum)
        .value("window_largest", Kind::window_largest)
        .value("linear", Kind::linear);
    nb::class_<Activation>(module, "Activation")
        .def(
            "__init__",
            [](Activation* self, Index channels, Index height, Index width, Pair halo, Index offset,
               Array<const Byte, 1> zero_point) {
                require(Index(zero_point.size()) == channels, "zero_point does not have one value for each channel");
                new (self) Activation{channels, height, width, halo.first, halo.second, offset,
                                      {zero_point.data(), zero_point.data() + zero_point.size()}};
            },
            nb::kw_only(), "channels"_a, "height"_a, "width"_a, "halo"_a, "offset"_a, "zero_point"_a.noconvert());
    nb::class_<StepConfig>(module, "StepConfig")
        .def(
            "__init__",
            [](StepConfig* self, Kind kind, Index input, std::optional<Index> output, std::optional<Index> residual,
               Index filters, Index groups, Index terms, Index quant_max, Pair kernel, Pair stride, Pair padding, Pair dilation) {
                require(terms > 0 && (terms == 1 || kind == Kind::adder), "only adder steps have several terms");
                new (self) StepConfig{kind,          input,         output.value_or(-1), residual.value_or(-1),
                                      filters,       groups,        terms,               quant_max,
                                      kernel.first,  kernel.second, stride.first,        stride.second,
                                      padding.first, padding.second, dilation.first,     dilation.second};
            },
            nb::kw_only(), "kind"_a, "input"_a, "output"_a.none(), "residual"_a.none(), "filters"_a, "groups"_a,
            "terms"_a, "quant_max"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a);
    nb::class_<StepFactors>(module, "StepFactors")
        .def(
            "__init__",
            [](StepFactors* self, std::optional<Int64Array> multiplier, std::optional<Int64Array> offset,
               std::optional<Int64Array> shift, std::optional<Int64Array> scale_exponent, std::optional<Int64Array> residual) {
                new (self) StepFactors{vector_of(multiplier), vector_of(offset), vector_of(shift), vector_of(scale_exponent),
                                       vector_of(residual)};
            },
            nb::kw_only(), "multiplier"_a.noconvert().none() = nb::none(), "offset"_a.noconvert().none() = nb::none(),
            "shift"_a.noconvert().none() = nb::none(), "scale_exponent"_a.noconvert().none() = nb::none(),
            "residual"_a.noconvert().none() = nb::none());
}

}  // namespace

void bind_integer(nb::module_& module) {
    module.def("integer_available", [] { return instruction_sets().names(); });
    bind_parts(module);
    nb::class_<Network>(module, "Network")
        .def(
            "__init__",
            [](Network* self, const std::string& isa, std::vector<Activation> activations, Index arena_bytes) {
                require(!activations.empty(), "a network needs at least one activation");
                new (self) Network(instruction_sets().pick(isa), std::move(activations), arena_bytes);
            },
            "isa"_a, nb::kw_only(), "activations"_a, "arena_bytes"_a)
        .def("add", add, "config"_a, "weight"_a.noconvert().none(), "factors"_a)
        .def(
            "run",
            [](const Network& self, Array<const Byte, 4> images, AnyArray output, int threads,
               std::optional<Array<double, 1>> seconds) {
                const Activation& a = self.input();
                require(Index(images.shape(1)) == a.height && Index(images.shape(2)) == a.width &&
                            Index(images.shape(3)) == a.channels,
                        "images do not have the shape [N, H, W, C] of the network's input");
                run(self, {images.data(), nullptr, 0.0f}, images.shape(0), output, threads, seconds);
            },
            "images"_a.noconvert(), "output"_a.noconvert(), nb::kw_only(), "threads"_a,
            "seconds"_a.noconvert().none() = nb::none())
        .def(
            "run_float",
            [](const Network& self, Array<const float, 4> images, AnyArray output, float scale_reciprocal, int threads) {
                const Activation& a = self.input();
                require(Index(images.shape(1)) == a.channels && Index(images.shape(2)) == a.height &&
                            Index(images.shape(3)) == a.width,
                        "images do not have the shape [N, C, H, W] of the network's input");
                run(self, {nullptr, images.data(), scale_reciprocal}, images.shape(0), output, threads, std::nullopt);
            },
            "images"_a.noconvert(), "output"_a.noconvert(), nb::kw_only(), "scale_reciprocal"_a, "threads"_a);
}

}  // namespace adderkit
