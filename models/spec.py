"""A model without its weights: every parameter's name, shape and logical axes. Enough to plan and to simulate; no jax.

Arrays are named ``layers.<n>.<module>.<array>``; before the layers ``embedding``, ``positions``, ``input_projection``;
after them ``norm.scale``, ``norm.bias``, ``output_projection``, ``head``. KV of layer n is ``kv.<n>``. Of a quantized
model, every matrix is followed by the scales of its output channels: ``head`` by ``head_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from spotjax.models.config import DecoderConfig, Experts, LayerKind
from spotjax.models.quantization import SCALE, ElementType, Quantization, scale_axes

Axes = tuple[str, ...]
"""Logical axis names: ``vocab positions embed heads kv_heads head_size mlp pages page_slot kv``; of experts ``expert``,
``expert_mlp`` (the width of each), and ``choices`` (what a router gives a score, which no mesh splits)."""

Arrays = dict[str, tuple[tuple[int, ...], Axes]]
"""Shapes and axes by name."""

ELEMENT_BYTES: dict[ElementType | None, int] = {"int8": 1, "float32": 4}

INPUTS = frozenset({"embedding", "embedding_scale", "positions", "input_projection"})
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
    """Shapes and logical axes of a model.

    Attributes:
      config: what it is made of.
      dtype_bytes: of one element of activations, KV and all parameters that are not quantized.
      quantization: of matrices.
    """

    config: DecoderConfig
    dtype_bytes: int = 4
    quantization: Quantization = "none"

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
        return self._with_scales(attention | feed_forward)

    @cached_property
    def inputs(self) -> dict[str, ArraySpec]:
        """What turns tokens into the first layer's input, by name."""
        c = self.config
        arrays: Arrays = {"embedding": ((c.vocab, c.embedding_width or c.width), ("vocab", "embed"))}
        if c.positions == "learned":
            arrays["positions"] = ((c.max_positions, c.width), ("positions", "embed"))
        if c.embedding_width is not None:
            arrays["input_projection"] = ((c.embedding_width, c.width), ("embed", "embed"))
        return self._edges(arrays)

    @cached_property
    def outputs(self) -> dict[str, ArraySpec]:
        """What turns the last layer's output into logits, by name; a tied embedding is an input as well."""
        c = self.config
        arrays: Arrays = self._norm("norm") if c.norm_place != "after" else {}
        if c.embedding_width is not None:
            arrays["output_projection"] = ((c.width, c.embedding_width), ("embed", "embed"))
        if c.tied_embeddings:
            tied = {name: array for name, array in self.inputs.items() if name in ("embedding", "embedding" + SCALE)}
            return self._edges(arrays) | tied
        arrays["head"] = ((c.embedding_width or c.width, c.vocab), ("embed", "vocab"))
        return self._edges(arrays)

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
        return sum(array.size * self.element_bytes(array.name) for array in self.parameters)

    def element_type(self, array: str) -> ElementType | None:
        """Of a parameter, or of a stack of them; None where it is kept at the dtype that the model is served at."""
        return self._element_types.get(array.split(".", 2)[2] if array.startswith("layers.") else array)

    def element_bytes(self, array: str) -> int:
        """Bytes of one element of a parameter, or of a stack of them."""
        return ELEMENT_BYTES.get(self.element_type(array), self.dtype_bytes)

    @cached_property
    def _element_types(self) -> dict[str, ElementType]:
        """By name, in a layer or outside."""
        shapes = self.layer_arrays | {array.name: (array.shape, array.axes) for array in self.edges}
        types: dict[str, ElementType] = {}
        for name in shapes:
            if name + SCALE in shapes:
                types |= {name: "int8", name + SCALE: "float32"}
        return types

    def _with_scales(self, arrays: Arrays) -> Arrays:
        """The same, and behind everything that is quantized its scales."""
        if self.quantization == "none":
            return arrays
        all_arrays: Arrays = {}
        for name, (shape, axes) in arrays.items():
            all_arrays[name] = shape, axes
            if (kept := scale_axes(axes)) is not None:
                all_arrays[name + SCALE] = tuple(shape[axis] for axis in kept), tuple(axes[axis] for axis in kept)
        return all_arrays

    def _edges(self, arrays: Arrays) -> dict[str, ArraySpec]:
        """Arrays outside the layers."""
        return {name: ArraySpec(name, shape, axes) for name, (shape, axes) in self._with_scales(arrays).items()}

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
