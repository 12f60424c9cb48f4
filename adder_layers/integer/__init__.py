"""Whole networks in integers: uint8 between the layers, ``Σ|x - w|`` of bytes in int32, no floating point."""
