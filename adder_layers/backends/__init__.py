"""Implementations of the adder convolution: plain torch in blocks, C++ for CPUs, Triton for GPUs."""
