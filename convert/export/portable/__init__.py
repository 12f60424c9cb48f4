"""Export quantized networks as C99 source, or as memory images for hardware."""
