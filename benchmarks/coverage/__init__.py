"""Coverage of timm: which of its models can be converted."""
