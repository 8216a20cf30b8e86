"""Whose saved KV is and what its pages look like. Imports no jax."""

from __future__ import annotations

# Registers bfloat16 with numpy, which has none of its own.
import ml_dtypes  # noqa: F401
import msgspec
import numpy as np


class KvFormat(msgspec.Struct, frozen=True):
    """Whose KV it is and what a page of a layer looks like. KV that differs in any of this is never used.

    Attributes:
      service: whose sequences they are; their keys mean nothing to another one.
      model: fingerprint of the weights.
      layers: of the model.
      kv_heads, head_size, page_size: K, H, G.
      dtype: of keys and values.
    """

    service: str
    model: str
    layers: int
    kv_heads: int
    head_size: int
    page_size: int
    dtype: str

    @property
    def elements(self) -> int:
        """Of the keys of one page of one layer; the values are as many."""
        return self.kv_heads * self.head_size * self.page_size

    @property
    def row_bytes(self) -> int:
        """Of one page of one layer."""
        return 2 * self.elements * np.dtype(self.dtype).itemsize
