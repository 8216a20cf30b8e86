"""A model without its weights: every parameter's name, shape and logical axes. Enough to plan and to simulate; no jax.

Arrays are named ``layers.<n>.<module>.<array>``; before the layers ``embedding``, ``positions``, ``input_projection``;
after them ``norm.scale``, ``norm.bias``, ``output_projection``, ``head``. KV of layer n is ``kv.<n>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from spotjax.models.config import DecoderConfig, Experts, LayerKind

Axes = tuple[str, ...]
"""Logical axis names: ``vocab positions embed heads kv_heads head_size mlp pages page_slot kv``; of experts ``expert``,
``expert_mlp`` (the width of each), and ``choices`` (what a router gives a score, which no mesh splits)."""

Arrays = dict[str, tuple[tuple[int, ...], Axes]]
"""Shapes and axes by name."""

INPUTS = frozenset({"embedding", "positions", "input_projection"})
"""Names of all arrays that any model may have before its layers."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a model.

    Attributes:
      name: unique in the model.
      shape: extents, in elements, of the whole array whatever the mesh.
      axes: logical name of every axis.
      layer: the decoder layer that it belongs to; None before the layers and after them.
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
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layer that the model has, in the order in which they come first."""
        return tuple(dict.fromkeys(map(self.config.kind, range(self.config.layers))))

    @cached_property
    def layer_kinds(self) -> tuple[int, ...]:
        """For every layer the number of its kind in ``kinds``."""
        numbers = {kind: number for number, kind in enumerate(self.kinds)}
        return tuple(numbers[self.config.kind(layer)] for layer in range(self.config.layers))

    @cached_property
    def layer_arrays(self) -> Arrays:
        """Shape and axes of each parameter of one decoder layer, by name within the layer."""
        attention = self._norm("attention_norm") | self._attention()
        feed_forward = self._norm("mlp_norm") | self._feed_forward()
        if self.config.norm_place == "both":
            attention |= self._norm("attention_output_norm")
            feed_forward |= self._norm("mlp_output_norm")
        return attention | feed_forward

    @cached_property
    def inputs(self) -> dict[str, ArraySpec]:
        """What turns tokens into the first layer's input, by name."""
        c = self.config
        arrays = [ArraySpec("embedding", (c.vocab, c.embedding_width or c.width), ("vocab", "embed"))]
        if c.positions == "learned":
            arrays.append(ArraySpec("positions", (c.max_positions, c.width), ("positions", "embed")))
        if c.embedding_width is not None:
            arrays.append(ArraySpec("input_projection", (c.embedding_width, c.width), ("embed", "embed")))
        return {array.name: array for array in arrays}

    @cached_property
    def outputs(self) -> dict[str, ArraySpec]:
        """What turns the last layer's output into logits, by name; a tied embedding is an input as well."""
        c = self.config
        arrays: list[ArraySpec] = []
        if c.norm_place != "after":
            arrays += [ArraySpec(name, shape, axes) for name, (shape, axes) in self._norm("norm").items()]
        if c.embedding_width is not None:
            arrays.append(ArraySpec("output_projection", (c.width, c.embedding_width), ("embed", "embed")))
        if c.tied_embeddings:
            arrays.append(self.inputs["embedding"])
        else:
            arrays.append(ArraySpec("head", (c.embedding_width or c.width, c.vocab), ("embed", "vocab")))
        return {array.name: array for array in arrays}

    @cached_property
    def edges(self) -> tuple[ArraySpec, ...]:
        """Every parameter outside the layers, once: inputs first."""
        return tuple((self.inputs | self.outputs).values())

    @cached_property
    def parameters(self) -> tuple[ArraySpec, ...]:
        """Every parameter: inputs first, then layer by layer, outputs last."""
        layers = (
            ArraySpec(f"layers.{layer}.{name}", shape, axes, layer)
            for layer in range(self.config.layers)
            for name, (shape, axes) in self.layer_arrays.items()
        )
        outputs = (array for name, array in self.outputs.items() if name not in self.inputs)
        return (*self.inputs.values(), *layers, *outputs)

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

    def _norm(self, module: str) -> Arrays:
        """A norm over D; LayerNorm has a bias."""
        names = ("scale", "bias") if self.config.norm == "layer" else ("scale",)
        return {f"{module}.{name}": ((self.config.width,), ("embed",)) for name in names}

    def _attention(self) -> Arrays:
        c = self.config
        arrays: Arrays = {
            "attention.query": ((c.width, c.heads, c.head_size), ("embed", "heads", "head_size")),
            "attention.key": ((c.width, c.kv_heads, c.head_size), ("embed", "kv_heads", "head_size")),
            "attention.value": ((c.width, c.kv_heads, c.head_size), ("embed", "kv_heads", "head_size")),
            "attention.output": ((c.heads, c.head_size, c.width), ("heads", "head_size", "embed")),
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
        return arrays

    def _feed_forward(self) -> Arrays:
        c = self.config
        if c.experts is not None:
            return self._experts(c.experts)
        into = ("gate", "up") if c.gated_mlp else ("up",)
        arrays: Arrays = {f"mlp.{name}": ((c.width, c.mlp), ("embed", "mlp")) for name in into}
        arrays["mlp.down"] = ((c.mlp, c.width), ("mlp", "embed"))
        if c.mlp_bias:
            arrays |= {f"mlp.{name}_bias": ((c.mlp,), ("mlp",)) for name in into}
            arrays["mlp.down_bias"] = ((c.width,), ("embed",))
        return arrays

    def _experts(self, experts: Experts) -> Arrays:
        width, mlp, shared = self.config.width, self.config.mlp, experts.shared_mlp
        arrays: Arrays = {"mlp.router": ((width, experts.count), ("embed", "choices"))}
        into, out = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")
        arrays |= {f"mlp.{name}": ((experts.count, width, mlp), into) for name in ("gate", "up")}
        arrays["mlp.down"] = ((experts.count, mlp, width), out)
        if shared:
            arrays |= {f"mlp.shared_{name}": ((width, shared), ("embed", "mlp")) for name in ("gate", "up")}
            arrays["mlp.shared_down"] = ((shared, width), ("mlp", "embed"))
            arrays["mlp.shared_router"] = ((width, 1), ("embed", "choices"))
        return arrays
