"""A training run: its loop, its directory, what it tells."""
