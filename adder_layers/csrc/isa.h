// Instruction sets: those that this build has and this machine runs, and the choice of one by name.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace adderkit {

#if defined(ADDERKIT_X86)
// Each asks for exactly the features that its objects are compiled with (AVX2, AVX512 and VNNI in CMakeLists.txt).
inline bool runs_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
inline bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
inline bool runs_avx512_vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// Kernel tables by the name of their instruction set, best first.
template <typename Kernels>
class InstructionSets {
  public:
    void add(std::string name, const Kernels& kernels) { sets_.emplace_back(std::move(name), kernels); }

    std::vector<std::string> names() const {
        std::vector<std::string> result;
        for (const auto& set : sets_) result.push_back(set.first);
        return result;
    }

    const Kernels& pick(const std::string& name) const {
        for (const auto& set : sets_)
            if (set.first == name) return set.second;
        throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
    }

  private:
    std::vector<std::pair<std::string, Kernels>> sets_;
};

}  // namespace adderkit
