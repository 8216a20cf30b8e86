"""Grouped-query attention in plain jax: the reference. Knows nothing of where keys and values are kept.

Keys come with positions last, values with head size last, so that both products read memory in order: on the CPU
backend this is twice as fast as the usual (positions, heads, head size). Values of all pages are one piece, since one
product over a whole context is faster than many small ones; keys would lose more by it than they gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spotjax.models.config import DecoderConfig, LayerKind


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores keys, and which of them it looks at.

    Attributes:
      scale: of the product of query and key.
      softcap: scores s become softcap * tanh(s / softcap); None leaves them.
      window: a query sees that many positions up to its own; None for all of them.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: DecoderConfig, kind: LayerKind) -> Scoring:
        """That of a model's layers of a kind."""
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        return cls(scale, config.attention_softcap, kind.window)


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, scoring: Scoring) -> jax.Array:
    """Softmax attention in float32.

    Args:
      query: (B, T, N, H).
      keys: (B, pages, K, H, G); K divides N, query head n uses key/value head n // (N / K).
      values: (B, K, pages * G, H).
      visible: (B, T, pages * G) bool, which positions each query sees; at least one for every query.
      scoring: its window is the business of whoever makes ``visible``.

    Returns: (B, T, N, H) in the dtype of ``query``.
    """
    batch, length, heads, size = query.shape
    kv_heads, context = values.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bpkhs->bkgtps", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(*scores.shape[:4], context) * jnp.float32(scoring.scale)
    scores = softcap(scores, scoring.softcap)
    scores = jnp.where(visible[:, None, None, :, :], scores, jnp.float32(-jnp.inf))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    # the queries of a kv head as one axis: XLA's CPU backend knows no mixed-precision product of several
    flat = weights.reshape(batch, kv_heads, -1, context)
    mixed = jnp.einsum("bkqs,bksh->bkqh", flat, values, preferred_element_type=jnp.float32)
    by_query = mixed.reshape(*weights.shape[:4], size).transpose(0, 3, 1, 2, 4)  # (B, T, K, N / K, H)
    return by_query.reshape(query.shape).astype(query.dtype)


def softcap(scores: jax.Array, bound: float | None) -> jax.Array:
    """Bounds float32 scores or logits smoothly (Bello et al. 2016); None leaves them."""
    return scores if bound is None else jnp.float32(bound) * jnp.tanh(scores / jnp.float32(bound))


def as_one_page(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, T, K, H) keys as a single page, and values, in the layout that ``attend`` reads."""
    return keys.transpose(0, 2, 3, 1)[:, None], values.transpose(0, 2, 1, 3)


def visibility(positions: jax.Array, context: int, window: int | None) -> jax.Array:
    """(B, T) positions of queries to (B, T, context) bool: each sees itself, and the window before it."""
    reach = jnp.arange(context, dtype=positions.dtype)[None, None, :]
    visible = reach <= positions[:, :, None]
    return visible if window is None else visible & (reach > positions[:, :, None] - window)
