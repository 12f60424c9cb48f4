"""Accuracy on real images: calibration, fine-tuning, pruning and quantization."""
