"""Convert convolutions to adder layers: configuration, targets, plan and in-place rewrite."""
