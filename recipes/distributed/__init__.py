"""Several processes: launching, sharding and synchronized BatchNorm."""
