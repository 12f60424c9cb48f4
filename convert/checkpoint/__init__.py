"""Save and load models: weights, configuration, report, replay of the record, and the entry point for timm."""
