"""Post-training quantization and fake quantization: from a float model to an integer-only network."""
