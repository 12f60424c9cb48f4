"""Speed on CPUs, of fp32 layers and of quantized networks."""
