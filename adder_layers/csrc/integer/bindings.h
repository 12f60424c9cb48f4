// Adds the executor of quantized networks to the Python extension.
#pragma once

#include <nanobind/nanobind.h>

namespace adderkit {

void bind_integer(nanobind::module_& module);

}  // namespace adderkit
