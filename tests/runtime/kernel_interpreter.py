"""Runs jax's ragged paged attention kernel, which is for TPUs, in jax's interpreter of TPU programs.

The interpreter of jax 0.10 lacks three things that the kernel uses: reshaped and bitcast references, and stores with a
mask of several axes. They are replaced by what they mean. Everything else of the kernel runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pallas_tpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel


class LoadedPages:
    """Pages that were copied from a reference, with the methods of a reference that the kernel calls."""

    def __init__(self, content: jax.Array) -> None:
        self._content, self.dtype = content, content.dtype

    def reshape(self, *shape: int) -> LoadedPages:
        return LoadedPages(self._content.reshape(*shape))

    def bitcast(self, dtype: Any) -> jax.Array:
        """Pairs of rows as one row of twice as wide elements, the first row in the lower halves."""
        rows, size = self._content.shape
        pairs = self._content.reshape(rows // 2, 2, size).swapaxes(1, 2)
        return jax.lax.bitcast_convert_type(pairs, dtype)

    def __getitem__(self, index: Any) -> jax.Array:
        return self._content[index]


def wait(self: kernel.MultiPageAsyncCopyDescriptor) -> LoadedPages:
    """Of the copy of pages."""
    for copy in self._async_copies:
        copy.wait()
    return LoadedPages(self._vmem_buf[...])


def store(ref: Any, value: jax.Array, *, mask: jax.Array) -> None:
    """Where the mask is true."""
    ref[...] = jnp.where(mask, value, ref[...])


@contextmanager
def interpreted() -> Iterator[None]:
    """Whatever is called in here, and was not compiled before, runs in the interpreter."""
    with pytest.MonkeyPatch.context() as patch, pallas_tpu.force_tpu_interpret_mode():
        patch.setattr(kernel.MultiPageAsyncCopyDescriptor, "wait", wait)
        patch.setattr(kernel.pltpu, "store", store)
        yield
