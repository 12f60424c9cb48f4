"""Write a model for other tools: ONNX and torch.export programs, C source, memory images."""
