// Adds the fp32 kernels to the Python extension.
#pragma once

#include <nanobind/nanobind.h>

namespace adderkit {

void bind_conv(nanobind::module_& module);

}  // namespace adderkit
