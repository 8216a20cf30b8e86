"""Attention by XLA on every platform: the reference, and what runs on CPUs. Pages lie as they travel."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from spotjax.models.attention import Scoring, attend, visibility
from spotjax.runtime.attention.backend import PageArray
from spotjax.runtime.kv import DevicePages, LayerPages, StepInput


@dataclass(frozen=True)
class XlaAttention:
    """See ``backend.AttentionBackend``."""

    head_size: int
    page_size: int

    def page_arrays(self, pages: int, heads: int) -> tuple[PageArray, ...]:
        """Keys (pages, K, H, G) and values (pages, K, G, H)."""
        keys = PageArray((pages, heads, self.head_size, self.page_size), 1)
        return keys, PageArray((pages, heads, self.page_size, self.head_size), 1)

    def store(self, pages: DevicePages, step: StepInput) -> XlaStore:
        """A layer's pages for one step."""
        return XlaStore(pages, step)

    def read_pages(self, pages: DevicePages, chosen: jax.Array, heads: int) -> LayerPages[jax.Array]:
        """Takes pages out."""
        keys, values = pages
        return LayerPages(keys[chosen], values[chosen])

    def write_pages(self, pages: DevicePages, chosen: jax.Array, content: LayerPages[jax.Array]) -> DevicePages:
        """Puts pages in."""
        keys, values = pages
        return keys.at[chosen].set(content.keys), values.at[chosen].set(content.values)


class XlaStore:
    """Reads each row's context back, as many positions as there is room for; what is not in use is masked."""

    def __init__(self, pages: DevicePages, step: StepInput) -> None:
        self.pages = pages
        self._step = step

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """See ``models.layers.KeyValueStore``."""
        step, page_size = self._step, self.pages[1].shape[2]
        page, slot = step.slots(page_size)
        all_keys = self.pages[0].at[page, :, :, slot].set(keys)
        all_values = self.pages[1].at[page, :, slot].set(values)
        self.pages = all_keys, all_values
        pages, positions = step.context(page_size, scoring.window)
        visible = visibility(positions, pages.shape[1] * page_size, scoring.window)
        paged = all_values[pages].swapaxes(1, 2)  # (B, K, pages, G, H), laid so while it is gathered
        context = paged.reshape(*paged.shape[:2], -1, paged.shape[-1])
        return attend(query, all_keys[pages], context, visible, scoring)
