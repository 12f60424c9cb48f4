"""Train a model: assembly, epochs, evaluation, resuming."""
