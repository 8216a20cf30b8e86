"""Attention on TPUs by the ragged paged attention kernel of jax: every query reads the pages of its own context only.

Source: Jiang et al., "Ragged Paged Attention" (2025); the kernel ships with ``jax.experimental.pallas.ops.tpu``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from spotjax.models.attention import Scoring
from spotjax.models.config import DecoderConfig
from spotjax.runtime.attention.backend import PageArray
from spotjax.runtime.kv import DevicePages, LayerPages, StepInput

LANES = 128
"""What the last axis of an array in a TPU's memory is a multiple of; the kernel wants it to be so in the shape."""

BLOCK_BYTES = 2 << 20
"""Of pages that the kernel takes at a time, at most: a TPU core has 16 MiB for two blocks, queries and sums."""


def padded_size(head_size: int) -> int:
    """Elements that a head takes in a page. Without padding it would take as many: XLA would pad it out of sight."""
    return -(-head_size // LANES) * LANES


def padded_heads(heads: int, bytes_per_element: int) -> int:
    """The kv heads that a page has room for: the kernel takes whole tiles of keys and values."""
    tiles = -(-2 * heads * bytes_per_element // 4)
    whole = next((size for size in (1, 2, 4, 8) if size >= tiles), -(-tiles // 8) * 8)
    return whole * 4 // bytes_per_element // 2


@dataclass(frozen=True)
class TpuAttention:
    """See ``backend.AttentionBackend``.

    Attributes:
      head_size: H.
      page_size: G.
      bytes_per_element: of keys and values.
      pages_per_block, queries_per_block: what the kernel takes at a time, at most. More pages spill its registers; most
        entries of jax's table of measured blocks have these values. The table itself has no contexts of many pages.
    """

    head_size: int
    page_size: int
    bytes_per_element: int
    pages_per_block: int = 16
    queries_per_block: int = 32

    @staticmethod
    def misfit(config: DecoderConfig, dtype: np.dtype, device: jax.Device) -> str | None:
        """Why this cannot serve a model, None if it can."""
        if device.device_kind.startswith(("TPU v2", "TPU v3")):
            return f"the kernel needs a TPU v4 or later, this is {device.device_kind}"
        if dtype == jnp.float32 and config.heads == config.kv_heads > 4:
            return "the kernel takes no more than 4 heads in float32 that share no keys and values"
        return None

    def page_arrays(self, pages: int, heads: int) -> tuple[PageArray, ...]:
        """One array (pages, G, 2 K, H): each position has key, value, key, value ... of its heads."""
        combined = 2 * padded_heads(heads, self.bytes_per_element)
        return (PageArray((pages, self.page_size, combined, padded_size(self.head_size)), 2),)

    def store(self, pages: DevicePages, step: StepInput) -> TpuStore:
        """A layer's pages for one step."""
        return TpuStore(pages, step, self)

    def read_pages(self, pages: DevicePages, chosen: jax.Array, heads: int) -> LayerPages[jax.Array]:
        """Takes pages out."""
        content = pages[0][chosen, :, : 2 * heads, : self.head_size]  # (n, G, 2 K, H)
        return LayerPages(content[:, :, 0::2].transpose(0, 2, 3, 1), content[:, :, 1::2].transpose(0, 2, 1, 3))

    def write_pages(self, pages: DevicePages, chosen: jax.Array, content: LayerPages[jax.Array]) -> DevicePages:
        """Puts pages in."""
        keys, values = content.keys.transpose(0, 3, 1, 2), content.values.transpose(0, 2, 1, 3)  # (n, G, K, H)
        return (pages[0].at[chosen].set(_interleaved(keys, values, pages[0])),)


class TpuStore:
    """Attends to the positions in use, and to no page beyond them."""

    def __init__(self, pages: DevicePages, step: StepInput, backend: TpuAttention) -> None:
        self.pages = pages
        self._step, self._backend = step, backend

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """See ``models.layers.KeyValueStore``."""
        step, (pages,) = self._step, self.pages
        pages = pages.at[step.slots(pages.shape[1])].set(_interleaved(keys, values, pages))
        self.pages = (pages,)
        batch, length, heads, size = query.shape
        wide_heads = pages.shape[2] // 2 * (heads // keys.shape[2])
        query = jnp.pad(query, ((0, 0), (0, 0), (0, wide_heads - heads), (0, pages.shape[3] - size)))
        ends = jnp.cumulative_sum(step.length, include_initial=True, dtype=jnp.int32)  # (B + 1,)
        # where a position of the padded step is among the valid ones of all rows
        place = jnp.where(step.valid, ends[:-1, None] + jnp.arange(length, dtype=jnp.int32)[None], batch * length)
        packed = jnp.zeros((batch * length, *query.shape[2:]), query.dtype).at[place].set(query, mode="drop")
        mixed = ragged_paged_attention(
            packed,
            pages,
            step.start + step.length,
            step.pages,
            ends,
            jnp.count_nonzero(step.length, keepdims=True).astype(jnp.int32),
            sm_scale=scoring.scale,
            sliding_window=scoring.window,
            soft_cap=scoring.softcap,
            num_kv_pages_per_block=self._pages_per_block(),
            num_queries_per_block=min(self._backend.queries_per_block, batch * length),
        )
        # for padding the kernel leaves whatever the memory had
        out: jax.Array = mixed[:, :heads, :size].at[place].get(mode="fill", fill_value=0)
        return out

    def _pages_per_block(self) -> int:
        """As many as there are, as may be, and as fit in a block that is read while another one is computed."""
        (pages,) = self.pages
        fitting = max(1, BLOCK_BYTES // (math.prod(pages.shape[1:]) * pages.dtype.itemsize))
        return min(self._backend.pages_per_block, self._step.pages.shape[1], fitting)


def _interleaved(keys: jax.Array, values: jax.Array, pages: jax.Array) -> jax.Array:
    """(..., K, H) keys and values to (..., 2 K, H) as a page has them, padded like it."""
    combined = jnp.stack([keys, values], axis=-2).reshape(*keys.shape[:-2], 2 * keys.shape[-2], keys.shape[-1])
    missing = (pages.shape[-2] - combined.shape[-2], pages.shape[-1] - combined.shape[-1])
    return jnp.pad(combined, [(0, 0)] * (combined.ndim - 2) + [(0, amount) for amount in missing])
