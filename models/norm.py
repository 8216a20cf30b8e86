"""RMSNorm and LayerNorm, in float32 whatever the dtype of what they are given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spotjax.models.config import DecoderConfig
from spotjax.models.parameters import Parameter, add_parameters


class Norm(nnx.Module):
    """The norm of the configuration over hidden vectors."""

    scale: Parameter  # (D,)
    bias: Parameter  # (D,)

    def __init__(self, config: DecoderConfig, name: str, *, rngs: nnx.Rngs) -> None:
        self.config = config
        add_parameters(self, config, name, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.bias[...] if self.config.norm == "layer" else None
        return normalize(self.config, x, self.scale[...], bias)


def normalize(config: DecoderConfig, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Normalises the last axis as the configuration says.

    Args:
      config: kind of norm, its epsilon, and whether one is added to the scale.
      x: (..., D).
      scale: (D,).
      bias: (D,) of LayerNorm, None of RMSNorm.
    """
    if bias is None:
        return rms_normalize(x, scale, config.norm_epsilon, zero_centered=config.zero_centered_norm)
    return layer_normalize(x, scale, bias, config.norm_epsilon)


def rms_normalize(x: jax.Array, scale: jax.Array, epsilon: float, *, zero_centered: bool = False) -> jax.Array:
    """Scales vectors to unit mean square (Zhang and Sennrich 2019), and multiplies by ``scale``.

    Where the scale is zero-centered, by 1 + scale, in float32 as in Gemma's own code.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + jnp.float32(epsilon))
    if zero_centered:
        return (normed * (1 + _like(scale.astype(jnp.float32), x))).astype(x.dtype)
    return normed.astype(x.dtype) * _like(scale, x)


def layer_normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Shifts vectors to mean zero and scales them to variance one (Ba et al. 2016), then ``scale`` and ``bias``."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + jnp.float32(epsilon))
    return normed.astype(x.dtype) * _like(scale, x) + _like(bias, x)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector with as many axes as ``x``."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))
