"""Structured pruning: remove whole channels of layers."""
