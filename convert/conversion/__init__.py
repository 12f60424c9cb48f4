"""Replace convolutions by adder layers: configuration, plan and in-place rewrite."""
