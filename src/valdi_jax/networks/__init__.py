"""Flax modules; apart from these files only the dynamics define any."""
