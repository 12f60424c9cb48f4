"""The ground: the adder operation, its reference, its gradients, and the module that carries it."""
