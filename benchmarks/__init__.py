"""Measurements: programs that run what the documentation claims and print it side by side."""
