"""The CIFAR networks of the AdderNet papers, registered with timm."""
