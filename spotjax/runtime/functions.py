"""The functions that a stage compiles: embedding, a block of decoder layers, logits. Pure, one tensor shard's view.

A block function serves any layers of the same kinds, because such layers differ in their arrays only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from spotjax.models.config import DecoderConfig, LayerKind
from spotjax.models.decoder import embed, logits
from spotjax.models.layers import DecoderLayer
from spotjax.models.projection import BY_XLA, Products
from spotjax.models.quantized import Matrix, with_scales
from spotjax.models.rope import rotations
from spotjax.models.shard import TensorShard
from spotjax.models.spec import ModelSpec
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.kv import DevicePages, StepInput, positions_of

LayerArrays = Mapping[str, jax.Array]
"""Parameters of one decoder layer by their name within the layer, e.g. ``attention.query``."""


def layer_graph(config: DecoderConfig, kind: LayerKind) -> nnx.GraphDef[DecoderLayer]:
    """The structure of a decoder layer without its arrays; all layers of a kind share it."""
    abstract = nnx.eval_shape(lambda: DecoderLayer(config, kind, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(abstract)
    return graph


def bind(graph: nnx.GraphDef[DecoderLayer], arrays: Mapping[str, Matrix]) -> DecoderLayer:
    """The layer that has these arrays."""
    nested: dict[str, dict[str, Matrix]] = {}
    for name, array in arrays.items():
        module, parameter = name.split(".")
        nested.setdefault(module, {})[parameter] = array
    layer: DecoderLayer = nnx.merge(graph, nested)
    return layer


class StageFunctions:
    """Functions of one model, for shards of one tensor degree; ``dtype`` is that of activations."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: TensorShard,
        attention: AttentionBackend,
        dtype: DTypeLike,
        products: Products = BY_XLA,
    ) -> None:
        self._config, self._kinds, self._shard, self._attention = spec.config, spec.kinds, shard, attention
        self._dtype, self._products = jnp.dtype(dtype), products
        self._graphs = [layer_graph(spec.config, kind) for kind in spec.kinds]

    def embed(self, inputs: Mapping[str, jax.Array], rows: jax.Array) -> jax.Array:
        """The step's rows (B, 2 + T) to hidden vectors (B, T, D)."""
        return embed(self._config, with_scales(inputs, self._dtype), rows[:, 2:], positions_of(rows), self._shard)

    def layers(
        self,
        kinds: Sequence[int],
        layers: Sequence[LayerArrays],
        pages: Sequence[DevicePages],
        hidden: jax.Array,
        step: StepInput,
    ) -> tuple[jax.Array, tuple[DevicePages, ...]]:
        """Runs consecutive layers, whose kinds are ``ModelSpec.kinds`` of these numbers. DONATES ``pages``.

        Returns: hidden vectors (B, T, D) and the layers' extended pages.
        """
        rotation = {kind: rotations(self._config, self._kinds[kind], step.positions) for kind in set(kinds)}
        products = self._products.without_padding(step.length)
        extended = []
        for kind, arrays, kv in zip(kinds, layers, pages, strict=True):
            store, whole = self._attention.store(kv, step), with_scales(arrays, self._dtype)
            hidden = bind(self._graphs[kind], whole)(hidden, rotation[kind], store, self._shard, products)
            extended.append(store.pages)
        return hidden, tuple(extended)

    def logits(self, outputs: Mapping[str, jax.Array], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        """Logits (B, V) float32 at the last valid position of every row."""
        last = jnp.maximum(rows[:, 1] - 1, 0)
        vectors = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        products = self._products.without_padding(rows[:, 1])
        return logits(self._config, with_scales(outputs, self._dtype), vectors, self._shard, products)
