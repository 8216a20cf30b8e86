"""Attention over pages by the library's kernel, in programs for CPUs. Pages lie as for XLA's."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from spotjax.models.attention import Scoring
from spotjax.runtime.attention.xla import XlaAttention, XlaStore
from spotjax.runtime.kv import DevicePages, StepInput
from spotjax.runtime.native.library import SERVED


@dataclass(frozen=True)
class NativeAttention(XlaAttention):
    """See ``attention.backend.AttentionBackend``. Reads a context as it is, not the room that a step has for it.

    Attributes:
      target: name of the kernel among XLA's custom calls.
    """

    target: str

    def store(self, pages: DevicePages, step: StepInput) -> XlaStore:
        """A layer's pages for one step."""
        return NativeStore(pages, step, self.target)


class NativeStore(XlaStore):
    """Writes and attends in one call, in place. No row may read what another row of the step writes."""

    def __init__(self, pages: DevicePages, step: StepInput, target: str) -> None:
        super().__init__(pages, step)
        self._target = target

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """See ``models.layers.KeyValueStore``."""
        if query.dtype not in SERVED:
            return super().attend(query, keys, values, scoring)
        results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (query, *self.pages)]
        call = jax.ffi.ffi_call(self._target, results, input_output_aliases={5: 1, 6: 2})
        mixed, *pages = call(
            query, keys, values, self._step.rows, self._step.pages, *self.pages,
            scale=np.float32(scoring.scale), softcap=np.float32(scoring.softcap or 0),
            window=np.int64(scoring.window or 0),
        )  # fmt: skip
        self.pages = tuple(pages)
        return mixed
