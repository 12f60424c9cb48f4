"""Save and load models: weights, configuration, report, and the entry point for timm."""
