"""Attention on GPUs: cuDNN's fused attention for spans, jax's paged attention kernel (Triton) for single positions.

The kernel reads the pages of each row's context where they lie. cuDNN wants one piece, so a prefill step gathers them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.models.attention import Scoring, visibility
from spotjax.models.config import DecoderConfig
from spotjax.runtime.attention.backend import PageArray
from spotjax.runtime.kv import DevicePages, LayerPages, StepInput

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jax 0.12 has it still, and names nothing in its place
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

BLOCK_POSITIONS = 128
"""Of keys that the kernel takes at a time."""
SPLIT_POSITIONS = 512
"""Of a context that one program of the kernel goes through; those of a longer one work side by side."""


@dataclass(frozen=True)
class GpuAttention:
    """See ``backend.AttentionBackend``.

    Attributes:
      head_size: H.
      page_size: G.
      emulated: computes the same without a GPU, for tests.
    """

    head_size: int
    page_size: int
    emulated: bool = False

    @staticmethod
    def misfit(config: DecoderConfig, page_size: int, dtype: np.dtype, device: jax.Device) -> str | None:
        """Why this cannot serve a model, None if it can. Nobody but the device is asked for its kind."""
        size, capability = config.head_size, float(getattr(device, "compute_capability", 0))
        if "cuda" not in device.client.platform_version or capability < 8:
            return f"cuDNN's attention needs CUDA and compute capability 8.0, this is {device.device_kind}"
        if dtype != jnp.bfloat16:
            return f"cuDNN's attention computes in bfloat16, not in {dtype}"
        if config.attention_softcap is not None:
            return "cuDNN's attention has no soft cap"
        if size != _power_of_two(size) or not 16 <= size <= (256 if capability >= 9 else 128):
            return f"heads of {size} elements; they must be a power of two from 16 to 128, or 256 from Hopper on"
        if page_size != _power_of_two(page_size):
            return f"pages of {page_size} positions; it must be a power of two"
        return None

    def page_arrays(self, pages: int, heads: int) -> tuple[PageArray, ...]:
        """Keys and values, both (K, pages, G, H)."""
        return (PageArray((heads, pages, self.page_size, self.head_size), 0),) * 2

    def store(self, pages: DevicePages, step: StepInput) -> GpuStore:
        """A layer's pages for one step."""
        return GpuStore(pages, step, self.emulated)

    def read_pages(self, pages: DevicePages, chosen: jax.Array, heads: int) -> LayerPages[jax.Array]:
        """Takes pages out."""
        keys, values = (array[:, chosen] for array in pages)  # (K, n, G, H)
        return LayerPages(keys.transpose(1, 0, 3, 2), values.swapaxes(0, 1))

    def write_pages(self, pages: DevicePages, chosen: jax.Array, content: LayerPages[jax.Array]) -> DevicePages:
        """Puts pages in."""
        keys, values = content.keys.transpose(1, 0, 3, 2), content.values.swapaxes(0, 1)
        return pages[0].at[:, chosen].set(keys), pages[1].at[:, chosen].set(values)


class GpuStore:
    """Decode steps attend to pages in place, where the layer has no window; all others to a gathered context."""

    def __init__(self, pages: DevicePages, step: StepInput, emulated: bool) -> None:
        self.pages = pages
        self._step, self._emulated = step, emulated

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """See ``models.layers.KeyValueStore``."""
        page, slot = self._step.slots(self.pages[0].shape[2])
        written = (
            array.at[:, page, slot].set(new.transpose(2, 0, 1, 3))
            for array, new in zip(self.pages, (keys, values), strict=True)
        )
        self.pages = tuple(written)
        if query.shape[1] == 1 and scoring.window is None:
            return self._one_position(query, scoring)
        return self._span(query, scoring)

    def _one_position(self, query: jax.Array, scoring: Scoring) -> jax.Array:
        numbers, page_size = self._step.pages, self.pages[0].shape[2]
        block = max(1, min(BLOCK_POSITIONS // page_size, _power_of_two(numbers.shape[1])))
        splits = -(-numbers.shape[1] // max(block, SPLIT_POSITIONS // page_size))
        numbers = jnp.pad(numbers, ((0, 0), (0, -numbers.shape[1] % (block * splits))))
        mixed: jax.Array = paged_attention(
            (query[:, 0].astype(jnp.float32) * jnp.float32(scoring.scale)).astype(query.dtype),
            *self.pages,
            numbers,
            self._step.start + self._step.length,
            pages_per_compute_block=block,
            k_splits=splits,
            attn_logits_soft_cap=scoring.softcap,
            interpret=self._emulated,
        )
        return mixed[:, None]

    def _span(self, query: jax.Array, scoring: Scoring) -> jax.Array:
        step, page_size = self._step, self.pages[0].shape[2]
        pages, positions = step.context(page_size, scoring.window)
        batch, context = pages.shape[0], pages.shape[1] * page_size
        gathered = (array[:, pages] for array in self.pages)  # (K, B, n, G, H)
        keys, values = (array.reshape(-1, batch, context, query.shape[3]).transpose(1, 2, 0, 3) for array in gathered)
        visible = visibility(positions, context, scoring.window)
        implementation: Literal["xla", "cudnn"] = "xla" if self._emulated else "cudnn"
        mixed: jax.Array = jax.nn.dot_product_attention(
            query, keys, values, mask=visible[:, None], scale=scoring.scale, implementation=implementation
        )
        return mixed


def _power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()
