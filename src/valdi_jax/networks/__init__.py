"""Flax modules, confined to these files and the dynamics."""
