"""What happens to a model: plan, rewrite, calibrate, count, save and load. Knows nothing of training."""
