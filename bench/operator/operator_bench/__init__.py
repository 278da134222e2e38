"""The operator's scale benchmark: see ../bench.py."""
