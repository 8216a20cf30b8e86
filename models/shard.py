"""Which shard of the ``tensor`` mesh axis code runs as, and what shards do together."""

from __future__ import annotations

import jax


class TensorShard:
    """The shard of the ``tensor`` mesh axis that code runs as.

    Attributes:
      degree: M; 1 means whole arrays and no collectives.
      axis: name of the mapped axis when ``degree`` is above 1.
    """

    def __init__(self, degree: int = 1, axis: str = "tensor") -> None:
        self.degree, self.axis = degree, axis

    def index(self) -> jax.Array | int:
        """Which shard this is."""
        return jax.lax.axis_index(self.axis) if self.degree > 1 else 0

    def sum(self, partial: jax.Array) -> jax.Array:
        """Adds the partial results of all shards."""
        return jax.lax.psum(partial, self.axis) if self.degree > 1 else partial

    def concatenate(self, part: jax.Array) -> jax.Array:
        """Joins the shards' parts along the last axis."""
        return jax.lax.all_gather(part, self.axis, axis=part.ndim - 1, tiled=True) if self.degree > 1 else part


WHOLE = TensorShard()
