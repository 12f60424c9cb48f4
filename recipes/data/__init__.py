"""Datasets, loaders and augmentation."""
