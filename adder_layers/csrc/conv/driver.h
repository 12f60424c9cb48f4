// Forward and input gradient for a whole tensor, with the kernels of one instruction set.
#pragma once

#include "kernels.h"
#include "planes.h"

namespace adderkit {

// Both return whether all operands are moderate, as the kernels need them: the result holds only then.

// y = -sum over levels of 2^-level * sum |x - w|; writes every element of y.
bool forward(const Problem& p, const Kernels& kernels, const float* x, const float* weight, float* y, int threads);

// result = sum over levels of 2^-level * sum over filters and taps of grad * HardTanh(w - x); elements that no window reads
// are not written.
bool input_grad(const Problem& p, const Kernels& kernels, const float* grad, const float* x, const float* weight,
                float* result, int threads);

}  // namespace adderkit
