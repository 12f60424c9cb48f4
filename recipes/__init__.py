"""Training: recipes, data, distillation, the adaptive rate, the loop and its run folder."""
