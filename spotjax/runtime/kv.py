"""KV pages on devices: how a layer writes and reads them during a step, and how pages are taken out and put back.

Page 0 is never given to a sequence; padding writes there.
Which sequence owns which page is the scheduler's business.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

A = TypeVar("A")


class StepInput(NamedTuple):
    """What every stage of a step is told: two int32 arrays, because only the layers need the pages.

    Attributes:
      rows: (B, 2 + T): first position of the row's span, number of valid positions (0 marks a padding row), token ids.
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


def positions_of(rows: jax.Array) -> jax.Array:
    """``StepInput.positions`` where there are only the rows."""
    steps = jnp.arange(rows.shape[1] - 2, dtype=jnp.int32)
    return rows[:, :1] + steps[None, :]


class LayerPages(NamedTuple, Generic[A]):
    """KV pages of one layer on one tensor shard, in the layout that ``models.attention`` reads.

    Or what belongs to each of the two arrays, such as its shape or sharding.

    Attributes:
      keys: (pages, K, H, G).
      values: (pages, K, G, H).
    """

    keys: A
    values: A


class PagedStore:
    """One layer's pages during one step; see ``models.layers.KeyValueStore``."""

    def __init__(self, pages: LayerPages[jax.Array], step: StepInput) -> None:
        self.pages = pages
        """Replaced by the extended pages."""
        self._step = step

    def extend(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Writes the step's keys and values, then reads each row's whole context back.

        The context is N * G positions long, whatever part of it is in use; ``visible`` masks the rest.
        """
        step, page_size = self._step, self.pages.values.shape[2]
        positions = step.positions
        valid = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :] < step.length[:, None]
        page = jnp.take_along_axis(step.pages, positions // page_size, axis=1, mode="clip")
        page, slot = jnp.where(valid, page, 0), positions % page_size
        self.pages = LayerPages(
            self.pages.keys.at[page, :, :, slot].set(keys), self.pages.values.at[page, :, slot].set(values)
        )
        reach = jnp.arange(step.pages.shape[1] * page_size, dtype=jnp.int32)
        visible = reach[None, None, :] <= positions[:, :, None]
        return self.pages.keys[step.pages], self.pages.values[step.pages], visible


def read_pages(pages: LayerPages[jax.Array], chosen: jax.Array) -> LayerPages[jax.Array]:
    """Takes the ``chosen`` (n,) int32 pages out."""
    return LayerPages(pages.keys[chosen], pages.values[chosen])


def write_pages(
    pages: LayerPages[jax.Array], chosen: jax.Array, content: LayerPages[jax.Array]
) -> LayerPages[jax.Array]:
    """Puts pages in. DONATES ``pages``. Entries of ``chosen`` that are 0 go to the page nobody reads."""
    return LayerPages(pages.keys.at[chosen].set(content.keys), pages.values.at[chosen].set(content.values))
