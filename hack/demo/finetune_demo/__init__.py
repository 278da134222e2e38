"""Steps of `make demo`, run by ../demo.py: what is applied, what is watched, and what is printed."""
