"""What a step says of KV pages, and their layout outside of devices.

Page 0 is never given to a sequence; padding writes there.
Which sequence owns which page is the scheduler's business; how pages lie on devices is an attention backend's.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

A = TypeVar("A")


class StepInput(NamedTuple):
    """What every stage of a step is told: two int32 arrays, because only the layers need the pages.

    Attributes:
      rows: (B, 2 + T): first position of the row's span, number of valid positions (0 marks a padding row; these come
        last), token ids.
      pages: (B, N) KV pages in position order, 0 where unused.
    """

    rows: jax.Array
    pages: jax.Array

    @property
    def start(self) -> jax.Array:
        """(B,) first position of each span."""
        return self.rows[:, 0]

    @property
    def length(self) -> jax.Array:
        """(B,) valid positions of each span."""
        return self.rows[:, 1]

    @property
    def tokens(self) -> jax.Array:
        """(B, T) token ids."""
        return self.rows[:, 2:]

    @property
    def positions(self) -> jax.Array:
        """(B, T) position of every token; meaningless beyond ``length``."""
        return positions_of(self.rows)

    @property
    def valid(self) -> jax.Array:
        """(B, T) bool: which positions are not padding."""
        return jnp.arange(self.rows.shape[1] - 2, dtype=jnp.int32)[None, :] < self.length[:, None]

    def slots(self, page_size: int) -> tuple[jax.Array, jax.Array]:
        """Page that every position of the step belongs to (0 for padding), and its place in it, both (B, T)."""
        page = jnp.take_along_axis(self.pages, self.positions // page_size, axis=1, mode="clip")
        return jnp.where(self.valid, page, 0), self.positions % page_size

    def context(self, page_size: int, window: int | None) -> tuple[jax.Array, jax.Array]:
        """What the step's queries look at.

        Args:
          page_size: G.
          window: how many positions up to its own a query sees; None for all.

        Returns: (B, n) pages that have all of it, and (B, T) positions of the queries counted from the first of these
          pages on. Padding has the position of a valid query, so that it sees something.
        """
        queries = jnp.minimum(self.positions, (self.start + jnp.maximum(self.length, 1) - 1)[:, None])
        held, span = self.pages.shape[1], self.rows.shape[1] - 2
        if window is None or (reached := (window + span + page_size - 3) // page_size + 1) >= held:
            return self.pages, queries
        first = jnp.clip((self.start - (window - 1)) // page_size, 0, held - reached)
        numbers = first[:, None] + jnp.arange(reached, dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(self.pages, numbers, axis=1), queries - (first * page_size)[:, None]


def positions_of(rows: jax.Array) -> jax.Array:
    """``StepInput.positions`` where there are only the rows."""
    steps = jnp.arange(rows.shape[1] - 2, dtype=jnp.int32)
    return rows[:, :1] + steps[None, :]


class LayerPages(NamedTuple, Generic[A]):
    """KV pages of one layer in the layout in which they are read out, moved, backed up and saved, on every platform.

    Or what belongs to each of the two arrays, such as its shape or sharding.

    Attributes:
      keys: (pages, K, H, G).
      values: (pages, K, G, H).
    """

    keys: A
    values: A


DevicePages = tuple[jax.Array, ...]
"""KV pages of one layer as they lie on devices: arrays that only their ``attention.AttentionBackend`` understands."""
