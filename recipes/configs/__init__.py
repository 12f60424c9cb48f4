"""Recipes: their schema, how they are read, and the YAML files that ship."""
