"""A model as one jitted function in a loop: the least that generation can be in plain jax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.meshes.slices import whole
from spotjax.models.attention import Scoring, attend, visibility
from spotjax.models.catalog import Model
from spotjax.models.decoder import embed, logits
from spotjax.models.rope import rotations
from spotjax.runtime.functions import bind, layer_graph


class ContiguousStore:
    """KV of one layer in one piece: (B, 1, K, H, S) keys and (B, K, S, H) values, filled up to ``position``."""

    def __init__(self, keys: jax.Array, values: jax.Array, position: jax.Array) -> None:
        self.keys, self.values, self._position = keys, values, position

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """See ``models.layers.KeyValueStore``."""
        at = self._position
        self.keys = jax.lax.dynamic_update_slice(self.keys, keys.transpose(0, 2, 3, 1)[:, None], (0, 0, 0, 0, at))
        self.values = jax.lax.dynamic_update_slice(self.values, values.transpose(0, 2, 1, 3), (0, 0, at, 0))
        positions = at + jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
        visible = visibility(positions, self.keys.shape[-1], scoring.window)
        return attend(query, self.keys, self.values, visible, scoring)


class BareLoop:
    """One model on the default device, KV contiguous."""

    def __init__(self, model: Model) -> None:
        spec = model.checkpoint.spec
        self._config = spec.config
        arrays = {a.name: jnp.asarray(model.checkpoint.read(a.name, whole(a.shape))) for a in spec.parameters}
        self._layers = [
            {name: arrays[f"layers.{layer}.{name}"] for name in spec.layer_arrays}
            for layer in range(spec.config.layers)
        ]
        self._ends = tuple({name: arrays[name] for name in ends} for ends in (spec.inputs, spec.outputs))
        graphs = [layer_graph(spec.config, kind) for kind in spec.kinds]

        def step(layers: Any, ends: Any, kv: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
            inputs, outputs = ends
            steps = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            positions = jnp.broadcast_to(steps, tokens.shape)
            rotation = [rotations(self._config, kind, positions) for kind in spec.kinds]
            hidden, extended = embed(self._config, inputs, tokens, positions), []
            for kind, layer, (keys, values) in zip(spec.layer_kinds, layers, kv, strict=True):
                store = ContiguousStore(keys, values, position)
                hidden = bind(graphs[kind], layer)(hidden, rotation[kind], store)
                extended.append((store.keys, store.values))
            scores = logits(self._config, outputs, hidden[:, -1])
            return jnp.argmax(scores, axis=-1).astype(jnp.int32), extended

        self._step = jax.jit(step, donate_argnums=2)

    def steps(self, prompts: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Continues (B, T) prompts greedily by so many tokens: (B,) of every step, as soon as they are read back."""
        c, (rows, length) = self._config, prompts.shape
        keys = (rows, 1, c.kv_heads, c.head_size, length + count)
        values = (rows, c.kv_heads, length + count, c.head_size)
        kv = [(jnp.zeros(keys), jnp.zeros(values)) for _ in range(c.layers)]
        token, kv = self._step(self._layers, self._ends, kv, jnp.asarray(prompts), jnp.int32(0))
        yield np.asarray(token)
        for index in range(count - 1):
            token, kv = self._step(self._layers, self._ends, kv, token[:, None], jnp.int32(length + index))
            yield np.asarray(token)
