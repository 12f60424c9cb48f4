"""Count the operations, bytes and energy of a network for one image."""
