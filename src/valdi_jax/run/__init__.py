"""A training run: loop, run directory and reports."""
