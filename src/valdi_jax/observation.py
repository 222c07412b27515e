"""The agent's observations; needs no JAX, because environment processes import it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Observation(NamedTuple):
    """One observation, or several with leading axes.

    A missing modality is ``None`` and costs nothing.
    """

    image: Any = None  # [..., height, width, channels] uint8
    vector: Any = None  # [..., vector_dim] float32

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, shared by both modalities."""
        return self.vector.shape[:-1] if self.image is None else self.image.shape[:-3]
