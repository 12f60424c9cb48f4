"""Structured pruning: remove whole channels."""
