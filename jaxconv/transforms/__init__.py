"""How lax's convolutions become planned ones: the primitive, and the ways to bind or lower it."""
