"""Triton backend for GPUs: kernels of the forward pass and the input gradient, tile table, and launcher."""
