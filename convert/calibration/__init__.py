"""Fit a converted model to its teacher without labels."""
