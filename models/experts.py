"""A mixture of experts: the few that a router chooses for a token compute it (Shazeer et al. 2017).

Nobody is dropped and no capacity is set, so what a token gives does not depend on what else is in the batch. Tokens are
sorted by expert: accelerators have kernels for such ragged products (``jax.lax.ragged_dot``); on the CPU, where that op
multiplies all tokens with all experts, a loop over blocks of tokens of the same expert reads the chosen experts only.

As in ``layers.py``, arrays may be whole or one tensor shard's: some of the experts, or a part of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.parameters import Parameter, add_parameters
from spotjax.models.projection import ACTIVATIONS, Products, project
from spotjax.models.quantized import Matrix, Quantized
from spotjax.models.shard import TensorShard

LARGEST_BLOCK = 64
"""Tokens that are multiplied with an expert at once on the CPU; 32 and 128 were slower for prompts."""
SMALLEST_BLOCK = 8
"""Where a step has as many tokens: each of a few experts is then read once."""


class Kernels(NamedTuple):
    """Of all experts that a shard holds.

    Attributes:
      gate, up: (E, D, F).
      down: (E, F, D).
      activation: of the gate.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: Callable[[jax.Array], jax.Array]


class MixtureOfExperts(nnx.Module):
    """Experts, each a feed-forward layer with a gate, and a router; perhaps one more that computes every token."""

    router: Parameter  # (D, E)
    gate: Parameter  # (E, D, F)
    up: Parameter  # (E, D, F)
    down: Parameter  # (E, F, D)
    shared_gate: Parameter  # (D, S)
    shared_up: Parameter  # (D, S)
    shared_down: Parameter  # (S, D)
    shared_router: Parameter  # (D, 1)

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        assert config.experts is not None
        self.experts, self.activation = config.experts, config.activation
        add_parameters(self, config, "mlp", rngs)

    def __call__(self, x: jax.Array, shard: TensorShard, products: Products) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = route(tokens @ self.router[...], self.experts)
        kernels = Kernels(self.gate[...], self.up[...], self.down[...], ACTIVATIONS[self.activation])
        held = kernels.gate.shape[0]
        first = 0 if held == self.experts.count else shard.index() * held
        block = block_size(len(tokens), self.experts)
        mixed = mix(tokens, chosen - first, weights, kernels, block)
        if self.experts.shared_mlp:
            mixed = mixed + self._shared(tokens, kernels.activation, products)
        return shard.sum(mixed.reshape(x.shape))

    def _shared(self, tokens: jax.Array, activation: Callable[[jax.Array], jax.Array], products: Products) -> jax.Array:
        """What every token gets, in part where its kernels are a shard's."""
        gate, up = products.project(tokens, [self.shared_gate[...], self.shared_up[...]])
        share = jax.nn.sigmoid(tokens @ self.shared_router[...])
        (down,) = products.project(activation(gate) * up, [self.shared_down[...]])
        return share * down


def route(scores: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """The k experts of each token and their weights, (R, k) int32 and float32, of scores (R, E)."""
    weights, chosen = lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), experts.per_token)
    if experts.normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights


def mix(tokens: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, block: int) -> jax.Array:
    """Sums what the chosen experts make of each token.

    Args:
      tokens: (R, D).
      chosen: (R, k) int32, experts by their place in ``kernels``; others, which other shards hold, add nothing.
      weights: (R, k) float32.
      kernels: of the experts here.
      block: see ``block_size``.

    Returns: (R, D).
    """
    (rows, per_token), held = chosen.shape, kernels.gate.shape[0]
    here = (chosen >= 0) & (chosen < held)
    expert = jnp.where(here, chosen, held).reshape(-1)
    order = jnp.argsort(expert, stable=True)  # those of other shards come last
    sizes = jnp.bincount(expert, length=held + 1)[:held].astype(jnp.int32)
    computed = lax.platform_dependent(
        tokens[order // per_token],
        sizes,
        cpu=partial(in_blocks, kernels, block),
        default=partial(ragged, kernels),
    )
    pairs = computed[jnp.argsort(order)].reshape(rows, per_token, -1).astype(jnp.float32)
    mixed = jnp.sum(jnp.where(here[:, :, None], pairs * weights[:, :, None], jnp.float32(0)), axis=1)
    return mixed.astype(tokens.dtype)


def ragged(kernels: Kernels, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
    """Computes tokens (P, D), the first ``sizes[0]`` of them by the first expert and so on; the rest is undefined."""
    inner = kernels.activation(ragged_product(tokens, kernels.gate, sizes))
    return ragged_product(inner * ragged_product(tokens, kernels.up, sizes), kernels.down, sizes)


def ragged_product(tokens: jax.Array, kernel: Matrix, sizes: jax.Array) -> jax.Array:
    """Each token (P, in) times the (in, out) kernel of its expert."""
    if not isinstance(kernel, Quantized):
        return lax.ragged_dot(tokens, kernel, sizes)
    values = kernel.values.astype(tokens.dtype)
    product = lax.ragged_dot(tokens, values, sizes, preferred_element_type=jnp.float32)
    expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(tokens))
    return (product * jnp.take(kernel.scale, expert, axis=0)).astype(tokens.dtype)


def in_blocks(kernels: Kernels, block: int, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same, at most ``block`` tokens of one expert at a time."""
    blocks = -(-sizes // block)
    ends, starts = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(tokens, ((0, block), (0, 0)))

    def compute(number: jax.Array, done: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, number, side="right")
        gate, up, down = jax.tree.map(partial(lax.dynamic_index_in_dim, index=expert, keepdims=False), kernels[:3])
        start = starts[expert] + (number - ends[expert] + blocks[expert]) * block
        mine = lax.dynamic_slice_in_dim(padded, start, block)
        made = project(kernels.activation(project(mine, gate)) * project(mine, up), down)
        # Beyond the expert's last token the block is wrong; the next block, or nobody, is there.
        return lax.dynamic_update_slice_in_dim(done, made, start, axis=0)

    computed: jax.Array = lax.fori_loop(0, ends[-1], compute, jnp.zeros_like(padded))
    return computed[: len(tokens)]


def block_size(rows: int, experts: Experts) -> int:
    """Tokens of a block: twice what an expert is chosen for by chance, never more than there are."""
    usual = 2 * rows * experts.per_token // experts.count
    return min(rows, max(SMALLEST_BLOCK, min(LARGEST_BLOCK, 1 << usual.bit_length())))
