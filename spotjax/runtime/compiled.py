"""The stage functions of one model as executables: what is compiled, under which key, with which shapes and shardings.

Knows neither parameters nor requests. Layers are called one by one until a whole stage's block is compiled in the
background for exactly the step's shape; then the block takes over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from spotjax.meshes.layout import kv_heads_per_shard
from spotjax.meshes.sharding import TENSOR_AXIS, array_sharding, own, replicated, stacked_shape, stage_mesh
from spotjax.models.projection import BY_XLA, Products
from spotjax.models.shard import TensorShard
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.attention.xla import XlaAttention
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant, controls_width, mask_words
from spotjax.runtime.executables import Devices, Executables, Key
from spotjax.runtime.functions import StageFunctions
from spotjax.runtime.kv import DevicePages, LayerPages, StepInput
from spotjax.runtime.program_cache import ProgramCache
from spotjax.runtime.sampling import drawn_tokens, drawn_width, fill_in, restrict, sample, with_logprobs

Call = Callable[..., Any]
Kinds = tuple[int, ...]
"""Kinds of consecutive layers, by their numbers in ``ModelSpec.kinds``."""
PAGES_PER_MOVE = 16
"""Pages that one ``read_pages`` or ``write_pages`` call moves."""


class CompiledModel:
    """Compiled functions of one model at one dtype and KV size, for any devices.

    Args:
      spec: the model.
      pages: KV pages of a replica, page 0 included.
      page_size: positions per page.
      max_positions: longest sequence.
      dtype: of activations, KV and parameters that are not quantized.
      cache_directory: where compiled programs are kept between runs; None keeps nothing.
      attention: how keys and values are kept and read on the devices; None for XLA's.
      products: who computes matrix products.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pages: int,
        page_size: int,
        max_positions: int,
        dtype: DTypeLike,
        cache_directory: Path | None = None,
        attention: AttentionBackend | None = None,
        products: Products = BY_XLA,
    ) -> None:
        self.spec, self.pages, self.page_size = spec, pages, page_size
        self.dtype = jnp.dtype(dtype)
        self.attention = attention or XlaAttention(spec.config.head_size, page_size)
        self.products = products
        self.executables = Executables(ProgramCache(cache_directory) if cache_directory is not None else None)
        self._max_positions = max_positions
        heads = (spec.config.heads, spec.config.kv_heads, spec.config.head_size)
        self._layout = repr((self.attention, pages, page_size, *heads, self.dtype.name))
        self._model = repr((spec, self.dtype.name, products))
        """What programs depend on that move KV pages, and those that compute; what draws tokens depends on neither."""
        self._arrays = {array.name: array for array in spec.parameters}
        self._calls: dict[Devices, threading.Lock] = {}

    def parameter_dtype(self, array: str) -> np.dtype:
        """Of a parameter on devices."""
        return np.dtype(self.spec.element_type(array) or self.dtype)

    def calls(self, devices: Devices) -> threading.Lock:
        """Held by whoever calls a function with buffers on these devices, and by whoever deletes such buffers.

        XLA ends the process when a buffer vanishes while a call on several devices takes it up (jaxlib 0.10).
        """
        return self._calls.setdefault(devices, threading.Lock())

    def embed(self, devices: Devices, rows: int, span: int) -> Call:
        """``(inputs, rows) -> hidden``."""
        return self.executables.get(
            ("embed", self._model, len(devices), rows, span), devices, partial(self._lower_embed, rows, span)
        )

    def block(self, devices: Devices, shape: StepShape, kinds: Kinds) -> Call | None:
        """``(layers, pages, hidden, step) -> (hidden, pages)`` for consecutive layers of these kinds, if compiled."""
        return self.executables.get_if_ready(self._layers_key(devices, shape, kinds), devices)

    def request_block(self, devices: Devices, shape: StepShape, kinds: Kinds) -> None:
        """Has ``block`` compiled in the background."""
        key = self._layers_key(devices, shape, kinds)
        self.executables.request(key, devices, partial(self._lower_layers, shape, kinds))

    def layer(self, devices: Devices, shape: StepShape, kind: int) -> Call:
        """The same for a single layer, compiled now if it never was."""
        key = self._layers_key(devices, shape, (kind,))
        return self.executables.get(key, devices, partial(self._lower_layers, shape, (kind,)))

    def _layers_key(self, devices: Devices, shape: StepShape, kinds: Kinds) -> Key:
        return "layers", self._model, self._layout, len(devices), shape, kinds

    def logits(self, devices: Devices, rows: int, span: int) -> Call:
        """``(outputs, hidden, rows) -> logits``."""
        return self.executables.get(
            ("logits", self._model, len(devices), rows, span), devices, partial(self._lower_logits, rows, span)
        )

    def sample(self, device: jax.Device, variant: Variant, rows: int) -> Call:
        """``(logits, controls) -> (packed result, drawn tokens)`` on one device; see ``sampling.drawn_tokens``."""
        key = ("sample", variant, rows, self.spec.config.vocab, controls_width(variant, self._max_positions))
        return self.executables.get(key, (device,), partial(self._lower_sample, variant, rows))

    def restrict(self, device: jax.Device, rows: int) -> Call:
        """``(logits, words) -> logits`` on one device; see ``sampling.restrict``."""
        key = ("restrict", rows, self.spec.config.vocab)
        return self.executables.get(key, (device,), partial(self._lower_restrict, rows))

    def with_logprobs(self, device: jax.Device, rows: int) -> Call:
        """``(logits, drawn tokens) -> packed result`` on one device, with the model's own log-probabilities."""
        key = ("logprobs", rows, self.spec.config.vocab)
        return self.executables.get(key, (device,), partial(self._lower_logprobs, rows))

    def fill_in(self, device: jax.Device, rows: int, drawn: int) -> Call:
        """``(rows, drawn tokens) -> rows`` on one device; see ``sampling.fill_in``."""
        return self.executables.get(("fill in", rows, drawn), (device,), partial(self._lower_fill_in, rows, drawn))

    def read_pages(self, devices: Devices) -> Call:
        """``(pages, chosen) -> content`` for PAGES_PER_MOVE pages, on this process's part of these devices."""
        return self._own_call("read pages", devices, self._lower_read)

    def write_pages(self, devices: Devices) -> Call:
        """``(pages, chosen, content) -> pages`` for PAGES_PER_MOVE pages, there too; donates ``pages``."""
        return self._own_call("write pages", devices, self._lower_write)

    def empty_pages(self, devices: Devices) -> Call:
        """``() -> pages`` of one layer, all zero, there too."""
        return self._own_call("empty pages", devices, self._lower_empty)

    def _own_call(self, name: str, devices: Devices, lower: Callable[[int, Devices], jax.stages.Lowered]) -> Call:
        """A function of KV pages. Shards do not depend on each other, so every process sees to its own."""
        part = own(devices)
        key = (name, self._layout, len(part), len(devices))
        return self.executables.get(key, part, partial(lower, len(devices)))

    def content_shardings(self, mesh: Mesh) -> LayerPages[NamedSharding]:
        """How pages that are read, or are to be written, lie on a stage's devices: kv heads are split."""
        split = NamedSharding(mesh, PartitionSpec(None, TENSOR_AXIS))
        return LayerPages(split, split)

    def _abstract_content(self, mesh: Mesh, tensor: int) -> LayerPages[Any]:
        """PAGES_PER_MOVE pages of the devices of ``mesh``, a part of ``tensor`` shards."""
        size, heads = self.spec.config.head_size, mesh.size * self._shard_heads(tensor)
        shapes = (PAGES_PER_MOVE, heads, size, self.page_size), (PAGES_PER_MOVE, heads, self.page_size, size)
        at = self.content_shardings(mesh)
        return LayerPages(
            self._abstract(shapes[0], at.keys, self.dtype), self._abstract(shapes[1], at.values, self.dtype)
        )

    def _shard_heads(self, tensor: int) -> int:
        """The kv heads on one of ``tensor`` shards."""
        return kv_heads_per_shard(self.spec.config.heads, self.spec.config.kv_heads, tensor)

    def _abstract_pages(self, mesh: Mesh, tensor: int) -> tuple[Any, ...]:
        """All KV pages of a layer on the devices of ``mesh``, a part of ``tensor`` shards."""
        abstract = []
        for array in self.attention.page_arrays(self.pages, self._shard_heads(tensor)):
            shape, split = list(array.shape), [None] * array.head_axis + [TENSOR_AXIS]
            shape[array.head_axis] *= mesh.size
            abstract.append(self._abstract(shape, NamedSharding(mesh, PartitionSpec(*split)), self.dtype))
        return tuple(abstract)

    def _abstract(self, shape: Sequence[int], sharding: NamedSharding, dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    def _abstract_array(self, array: ArraySpec, mesh: Mesh) -> Any:
        shape, sharding = stacked_shape(array, self.spec, mesh.size), array_sharding(array, self.spec, mesh)
        return self._abstract(shape, sharding, self.parameter_dtype(array.name))

    def _abstract_layer(self, mesh: Mesh) -> Mapping[str, Any]:
        return {name: self._abstract_array(self._arrays[f"layers.0.{name}"], mesh) for name in self.spec.layer_arrays}

    def _abstract_edge(self, arrays: Mapping[str, ArraySpec], mesh: Mesh) -> Mapping[str, Any]:
        return {name: self._abstract_array(array, mesh) for name, array in arrays.items()}

    def _abstract_rows(self, rows: int, span: int, mesh: Mesh) -> Any:
        return self._abstract((rows, 2 + span), replicated(mesh), jnp.int32)

    def _abstract_hidden(self, rows: int, span: int, mesh: Mesh) -> Any:
        return self._abstract((rows, span, self.spec.config.width), replicated(mesh), self.dtype)

    def _functions(self, mesh: Mesh) -> StageFunctions:
        shard = TensorShard(mesh.size, TENSOR_AXIS)
        return StageFunctions(self.spec, shard, self.attention, self.dtype, self.products)

    def _lower(
        self, function: Call, arguments: Sequence[Any], results: Any, mesh: Mesh, donate: tuple[int, ...] = ()
    ) -> jax.stages.Lowered:
        """Lowers ``function``, written for one shard, over the stage's devices."""
        if mesh.size > 1:
            specs = jax.tree.map(lambda argument: argument.sharding.spec, tuple(arguments))
            function = jax.shard_map(
                function,
                mesh=mesh,
                in_specs=specs,
                out_specs=jax.tree.map(lambda at: at.spec, results),
                check_vma=False,
            )
        jitted = jax.jit(function, donate_argnums=donate, out_shardings=results)
        with exact_products(self.dtype, mesh.devices.flat[0].platform):
            lowered: jax.stages.Lowered = jitted.lower(*arguments)
        return lowered

    def _lower_embed(self, rows: int, span: int, devices: Devices) -> jax.stages.Lowered:
        mesh = stage_mesh(devices)
        arguments = [self._abstract_edge(self.spec.inputs, mesh), self._abstract_rows(rows, span, mesh)]
        return self._lower(self._functions(mesh).embed, arguments, replicated(mesh), mesh)

    def _lower_layers(self, shape: StepShape, kinds: Kinds, devices: Devices) -> jax.stages.Lowered:
        mesh, layers = stage_mesh(devices), len(kinds)
        pages, numbers = self._abstract_pages(mesh, mesh.size), (shape.rows, shape.pages)
        arguments = [
            (self._abstract_layer(mesh),) * layers,
            (pages,) * layers,
            self._abstract_hidden(shape.rows, shape.span, mesh),
            StepInput(
                self._abstract_rows(shape.rows, shape.span, mesh), self._abstract(numbers, replicated(mesh), jnp.int32)
            ),
        ]
        results = (replicated(mesh), (_shardings(pages),) * layers)
        return self._lower(partial(self._functions(mesh).layers, kinds), arguments, results, mesh, donate=(1,))

    def _lower_logits(self, rows: int, span: int, devices: Devices) -> jax.stages.Lowered:
        mesh = stage_mesh(devices)
        arguments = [
            self._abstract_edge(self.spec.outputs, mesh),
            self._abstract_hidden(rows, span, mesh),
            self._abstract_rows(rows, span, mesh),
        ]
        return self._lower(self._functions(mesh).logits, arguments, replicated(mesh), mesh)

    def _lower_sample(self, variant: Variant, rows: int, devices: Devices) -> jax.stages.Lowered:
        width = controls_width(variant, self._max_positions)
        arguments = [
            self._on_one(devices, (rows, self.spec.config.vocab), jnp.float32),
            self._on_one(devices, (rows, width), jnp.int32),
        ]

        def draw(logits: jax.Array, controls: jax.Array) -> tuple[jax.Array, jax.Array]:
            result = sample(variant, logits, controls)
            return result, drawn_tokens(result)

        # greedy ignores its controls; keeping them makes all variants callable alike
        return jax.jit(draw, keep_unused=True).lower(*arguments)

    def _lower_restrict(self, rows: int, devices: Devices) -> jax.stages.Lowered:
        vocab = self.spec.config.vocab
        words = self._on_one(devices, (rows, mask_words(vocab)), jnp.int32)
        return jax.jit(restrict).lower(self._on_one(devices, (rows, vocab), jnp.float32), words)

    def _lower_logprobs(self, rows: int, devices: Devices) -> jax.stages.Lowered:
        logits = self._on_one(devices, (rows, self.spec.config.vocab), jnp.float32)
        tokens = self._on_one(devices, (drawn_width(rows),), jnp.int32)
        return jax.jit(lambda logits, tokens: with_logprobs(logits, tokens[:rows])).lower(logits, tokens)

    def _on_one(self, devices: Devices, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An array on the first of some devices."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))

    def _lower_fill_in(self, rows: int, drawn: int, devices: Devices) -> jax.stages.Lowered:
        arguments = [self._on_one(devices, shape, jnp.int32) for shape in ((rows, 3), (drawn,))]
        return jax.jit(fill_in).lower(*arguments)

    def _lower_read(self, tensor: int, devices: Devices) -> jax.stages.Lowered:
        mesh = stage_mesh(devices)
        arguments = [self._abstract_pages(mesh, tensor), self._abstract_chosen(mesh)]
        read = partial(self.attention.read_pages, heads=self._shard_heads(tensor))
        return self._lower(read, arguments, self.content_shardings(mesh), mesh)

    def _lower_write(self, tensor: int, devices: Devices) -> jax.stages.Lowered:
        mesh = stage_mesh(devices)
        pages = self._abstract_pages(mesh, tensor)
        arguments = [pages, self._abstract_chosen(mesh), self._abstract_content(mesh, tensor)]
        return self._lower(self.attention.write_pages, arguments, _shardings(pages), mesh, donate=(0,))

    def _lower_empty(self, tensor: int, devices: Devices) -> jax.stages.Lowered:
        pages = self._abstract_pages(stage_mesh(devices), tensor)

        def empty() -> DevicePages:
            return tuple(jnp.zeros(array.shape, array.dtype) for array in pages)

        return jax.jit(empty, out_shardings=_shardings(pages)).lower()

    def _abstract_chosen(self, mesh: Mesh) -> Any:
        return self._abstract((PAGES_PER_MOVE,), replicated(mesh), jnp.int32)


def exact_products(dtype: DTypeLike, platform: str) -> AbstractContextManager[object]:
    """Where float32 is served it is multiplied as such; accelerators take fewer bits unless they are told not to."""
    precision: AbstractContextManager[object] = nullcontext()
    if dtype == jnp.float32 and platform != "cpu":
        precision = jax.default_matmul_precision("highest")
    return precision


def _shardings(arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(array.sharding for array in arrays)
