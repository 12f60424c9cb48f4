"""Quantized networks for other tools: C99 source, and memory images for hardware."""
