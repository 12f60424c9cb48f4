// The part of the Python extension `_cpu` that runs quantized networks. Sizes and pointers come from
// adder_layers/integer/cpu_engine.py, which has checked the plan.
#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "network.h"

namespace nb = nanobind;

namespace adderkit {
namespace {

struct IntegerSet {
    std::string name;
    IntegerKernels kernels;
};

// Those that this build has and this machine runs, best first.
std::vector<IntegerSet> available() {
    std::vector<IntegerSet> found;
#if defined(ADDERKIT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni")) {
        found = {{"avx512_float", avx512_float_integer_kernels()}, {"avx512", avx512_integer_kernels()}};
        if (!__builtin_cpu_is("amd")) std::swap(found[0], found[1]);  // not measured there
    }
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", avx2_integer_kernels()});
#endif
    found.push_back({"baseline", baseline_integer_kernels()});
    return found;
}

IntegerKernels pick(const std::string& name) {
    for (const IntegerSet& candidate : available())
        if (candidate.name == name) return candidate.kernels;
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

template <typename T>
T* pointer(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

// Sizes in the order in which the struct declares them.
template <typename Sizes>
Sizes sizes_of(const std::vector<Index>& values) {
    if (values.size() * sizeof(Index) != sizeof(Sizes))
        throw std::invalid_argument("expected " + std::to_string(sizeof(Sizes) / sizeof(Index)) + " sizes, got " +
                                    std::to_string(values.size()));
    Sizes result;
    std::copy(values.begin(), values.end(), reinterpret_cast<Index*>(&result));
    return result;
}

using ActivationOf = std::tuple<std::vector<Index>, std::vector<Byte>>;

std::vector<Activation> activations_of(const std::vector<ActivationOf>& given) {
    std::vector<Activation> result;
    for (const auto& [sizes, zero] : given)
        result.push_back({sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), sizes.at(4), sizes.at(5), zero});
    return result;
}

}  // namespace

void bind_integer(nb::module_& module) {
    module.def("integer_available", [] {
        std::vector<std::string> names;
        for (const IntegerSet& set : available()) names.push_back(set.name);
        return names;
    });
    nb::class_<Network>(module, "Network")
        .def("__init__",
             [](Network* self, const std::string& isa, const std::vector<ActivationOf>& activations, Index bytes) {
                 new (self) Network(pick(isa), activations_of(activations), bytes);
             })
        .def("add",
             [](Network& self, const std::vector<Index>& sizes, std::uintptr_t weight,
                const std::vector<std::vector<std::int64_t>>& factors) {
                 self.add(sizes_of<StepSizes>(sizes), pointer<const Byte>(weight),
                          {factors.at(0), factors.at(1), factors.at(2), factors.at(3), factors.at(4)});
             })
        .def("run", [](const Network& self, std::uintptr_t bytes, std::uintptr_t floats, float reciprocal, Index images,
                       std::uintptr_t output, int threads, std::uintptr_t seconds) {
            nb::gil_scoped_release release;
            self.run({pointer<const Byte>(bytes), pointer<const float>(floats), reciprocal}, images, pointer<void>(output),
                     threads, pointer<double>(seconds));
        });
}

}  // namespace adderkit
