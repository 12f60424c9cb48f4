"""Label-free calibration: fit a converted model to the network it was made from."""
