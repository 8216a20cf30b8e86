"""A model without its weights: every parameter's name, shape and logical axes. Enough to plan and to simulate; no jax.

Arrays are named ``embedding``, ``layers.<n>.<module>.<array>``, ``norm.scale`` and ``head``; KV of layer n ``kv.<n>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from spotjax.models.config import DecoderConfig

Axes = tuple[str, ...]
"""Logical axis names: ``vocab embed heads kv_heads head_size mlp pages page_slot kv``."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a model.

    Attributes:
      name: unique in the model.
      shape: extents, in elements, of the whole array whatever the mesh.
      axes: logical name of every axis.
      layer: the decoder layer that it belongs to; None for embedding, final norm and head.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    layer: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and logical axes of a model."""

    config: DecoderConfig
    dtype_bytes: int = 4

    @cached_property
    def layer_arrays(self) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """Shape and axes of each parameter of one decoder layer, by name within the layer."""
        c = self.config
        arrays: dict[str, tuple[tuple[int, ...], Axes]] = {
            "attention_norm.scale": ((c.width,), ("embed",)),
            "attention.query": ((c.width, c.heads, c.head_size), ("embed", "heads", "head_size")),
            "attention.key": ((c.width, c.kv_heads, c.head_size), ("embed", "kv_heads", "head_size")),
            "attention.value": ((c.width, c.kv_heads, c.head_size), ("embed", "kv_heads", "head_size")),
            "attention.output": ((c.heads, c.head_size, c.width), ("heads", "head_size", "embed")),
            "mlp_norm.scale": ((c.width,), ("embed",)),
            "mlp.gate": ((c.width, c.mlp), ("embed", "mlp")),
            "mlp.up": ((c.width, c.mlp), ("embed", "mlp")),
            "mlp.down": ((c.mlp, c.width), ("mlp", "embed")),
        }
        if c.attention_bias:
            arrays["attention.query_bias"] = ((c.heads, c.head_size), ("heads", "head_size"))
            arrays["attention.key_bias"] = ((c.kv_heads, c.head_size), ("kv_heads", "head_size"))
            arrays["attention.value_bias"] = ((c.kv_heads, c.head_size), ("kv_heads", "head_size"))
        if c.output_bias:
            arrays["attention.output_bias"] = ((c.width,), ("embed",))
        if c.qk_norm:
            arrays["attention.query_norm"] = ((c.head_size,), ("head_size",))
            arrays["attention.key_norm"] = ((c.head_size,), ("head_size",))
        if c.mlp_bias:
            arrays["mlp.gate_bias"] = ((c.mlp,), ("mlp",))
            arrays["mlp.up_bias"] = ((c.mlp,), ("mlp",))
            arrays["mlp.down_bias"] = ((c.width,), ("embed",))
        return arrays

    @cached_property
    def parameters(self) -> tuple[ArraySpec, ...]:
        """Every parameter: embedding first, then layer by layer, final norm and head last."""
        c = self.config
        arrays = [ArraySpec("embedding", (c.vocab, c.width), ("vocab", "embed"))]
        for layer in range(c.layers):
            arrays += [
                ArraySpec(f"layers.{layer}.{name}", shape, axes, layer)
                for name, (shape, axes) in self.layer_arrays.items()
            ]
        arrays.append(ArraySpec("norm.scale", (c.width,), ("embed",)))
        if not c.tied_embeddings:
            arrays.append(ArraySpec("head", (c.width, c.vocab), ("embed", "vocab")))
        return tuple(arrays)

    def kv_array(self, layer: int, pages: int, page_size: int) -> ArraySpec:
        """Keys (0) and values (1) of one layer, in ``pages`` pages of ``page_size`` positions each."""
        shape = (2, pages, page_size, self.config.kv_heads, self.config.head_size)
        return ArraySpec(f"kv.{layer}", shape, ("kv", "pages", "page_slot", "kv_heads", "head_size"), layer)

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.size for array in self.parameters) * self.dtype_bytes

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of keys and values of one token position, all layers together."""
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_size * self.dtype_bytes
