"""What an attention backend is: it owns how KV pages lie on devices, and all that reads and writes them there."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax

from spotjax.models.layers import KeyValueStore
from spotjax.runtime.kv import DevicePages, LayerPages, StepInput


class PageArray(NamedTuple):
    """One of the arrays that hold a layer's pages on one tensor shard.

    Attributes:
      shape: of the array.
      head_axis: along which the arrays of several shards are one.
    """

    shape: tuple[int, ...]
    head_axis: int


class PagedStore(KeyValueStore, Protocol):
    """One layer's pages during one step.

    Attributes:
      pages: as given, or extended once ``attend`` was called.
    """

    pages: DevicePages


class AttentionBackend(Protocol):
    """Attention over pages. Its functions are pure and see one tensor shard. ``repr`` tells backends apart."""

    def page_arrays(self, pages: int, heads: int) -> tuple[PageArray, ...]:
        """What holds that many pages of one layer, with so many kv heads on the shard."""
        ...

    def store(self, pages: DevicePages, step: StepInput) -> PagedStore:
        """A layer's pages for one step."""
        ...

    def read_pages(self, pages: DevicePages, chosen: jax.Array, heads: int) -> LayerPages[jax.Array]:
        """Takes the ``chosen`` (n,) int32 pages out."""
        ...

    def write_pages(self, pages: DevicePages, chosen: jax.Array, content: LayerPages[jax.Array]) -> DevicePages:
        """Puts pages in. DONATES ``pages``. Entries of ``chosen`` that are 0 go to the page nobody reads."""
        ...
