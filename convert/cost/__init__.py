"""Count operations, bytes and energy."""
