// The Python extension `_cpu`: picks an instruction set and hands pointers to the kernels. It checks sizes against
// nothing: adder_layers/backends/cpu.py is its only caller and passes what the operator has validated.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "conv/driver.h"
#include "integer/bindings.h"

namespace nb = nanobind;

namespace adderkit {

struct InstructionSet {
    std::string name;
    Kernels kernels;
};

// Those that this build has and this machine runs, best first.
static std::vector<InstructionSet> available() {
    std::vector<InstructionSet> found;
#if defined(ADDERKIT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        found.push_back({"avx512", avx512_kernels()});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", avx2_kernels()});
#endif
    found.push_back({"baseline", baseline_kernels()});
    return found;
}

static InstructionSet pick(const std::string& name) {
    for (const InstructionSet& candidate : available())
        if (candidate.name == name) return candidate;
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

// Sizes and strides in the order in which Problem declares them.
static Problem problem(const std::vector<Index>& sizes) {
    constexpr std::size_t expected = sizeof(Problem) / sizeof(Index);
    if (sizes.size() != expected)
        throw std::invalid_argument("expected " + std::to_string(expected) + " sizes, got " + std::to_string(sizes.size()));
    Problem result;
    std::copy(sizes.begin(), sizes.end(), reinterpret_cast<Index*>(&result));
    return result;
}

template <typename T = float>
static T* pointer(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace adderkit

NB_MODULE(_cpu, module) {
    using namespace adderkit;
    module.doc() = "Adder convolution kernels for the CPU in fp32, and networks in integers.";
    bind_integer(module);
    module.def("available", [] {
        std::vector<std::string> names;
        for (const InstructionSet& set : available()) names.push_back(set.name);
        return names;
    });
    module.def("forward", [](const std::string& isa, const std::vector<Index>& sizes, std::uintptr_t x,
                             std::uintptr_t weight, std::uintptr_t y, int threads) {
        const Problem p = problem(sizes);
        const InstructionSet set = pick(isa);
        nb::gil_scoped_release release;
        forward(p, set.kernels, pointer(x), pointer(weight), pointer(y), threads);
    });
    module.def("input_grad", [](const std::string& isa, const std::vector<Index>& sizes, std::uintptr_t grad,
                                std::uintptr_t x, std::uintptr_t weight, std::uintptr_t result, int threads) {
        const Problem p = problem(sizes);
        const InstructionSet set = pick(isa);
        nb::gil_scoped_release release;
        input_grad(p, set.kernels, pointer(grad), pointer(x), pointer(weight), pointer(result), threads);
    });
}
