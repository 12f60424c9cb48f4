"""Triton kernels for GPUs: forward pass, input gradient, tile table and launcher."""
