"""The adder convolution: reference, operators with their gradients, modules, and integer inference."""
