"""The pure core: what should exist, what failed and why, what the status says. No I/O, clock, environment or chance."""
