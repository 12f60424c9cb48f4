// The Python extension `_cpu`; adder_layers/_cpu.pyi describes it to Python.
#include "conv/bindings.h"
#include "integer/bindings.h"

NB_MODULE(_cpu, module) {
    module.doc() = "Adder convolution kernels for CPUs in fp32, and an executor of quantized networks.";
    nanobind::set_leak_warnings(false);  // networks that live until the process ends are not leaks
    adderkit::bind_conv(module);
    adderkit::bind_integer(module);
}
