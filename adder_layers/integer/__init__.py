"""Integer-only networks: uint8 activations, ``Σ|x - w|`` of bytes in int32, no floating point."""
