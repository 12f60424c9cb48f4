"""Export models: ONNX and torch.export programs, C source, memory images."""
