"""Weights that somebody else saved: the files, containers and names that common training tools use."""
