"""What an agent sees. Needs NumPy alone, so that an environment's process needs no more."""

from __future__ import annotations

from typing import Any, NamedTuple


class Observation(NamedTuple):
    """One observation, or several under leading axes.

    A modality that an environment lacks is ``None`` and costs nothing.
    """

    image: Any = None  # [..., height, width, channels] uint8
    vector: Any = None  # [..., vector_dim] float32

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, which both modalities share."""
        return self.vector.shape[:-1] if self.image is None else self.image.shape[:-3]
