"""Count the operations, bytes, energy and area of a network for one image."""
