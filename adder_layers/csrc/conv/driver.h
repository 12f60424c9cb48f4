// Forward and input gradient for a whole tensor, with the kernels of one instruction set.
#pragma once

#include "kernels.h"
#include "planes.h"

namespace adderkit {

// y = -sum |x - w|; writes every element of y.
void forward(const Problem& p, const Kernels& kernels, const float* x, const float* weight, float* y, int threads);

// result = sum over filters and taps of grad * HardTanh(w - x); elements that no window reads are not written.
void input_grad(const Problem& p, const Kernels& kernels, const float* grad, const float* x, const float* weight,
                float* result, int threads);

}  // namespace adderkit
