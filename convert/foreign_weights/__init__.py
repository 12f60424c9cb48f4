"""Weights that somebody else saved: files, containers and names of the tools that people train with."""
