"""Rotary position embedding and its scaling variants, in the half-split order of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.models.config import DecoderConfig, LayerKind, RopeScaling

Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines of the angles by which pairs of elements are rotated: two (B, T, 1, R / 2) float32 arrays."""


def frequencies(config: DecoderConfig, kind: LayerKind) -> tuple[np.ndarray, float]:
    """Angular frequency of every rotated pair, and the scale of the rotated vectors.

    Returns: ((R / 2,) float32 radians per position, attention scale), with R the rotated part of a head.

    Source: Su et al. 2021; ``llama3`` as in Meta's Llama 3.1 release; ``yarn`` Peng et al. 2023, section 3.
    """
    size = config.rotary_size or config.head_size
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    base = (1.0 / np.float32(kind.rope_base) ** exponents).astype(np.float32)
    scaling = kind.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    return _yarn(base, scaling, kind.rope_base)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    turns = scaling.original_positions * base / (2 * np.pi)
    smooth = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    smooth = np.clip(smooth, 0.0, 1.0)
    stretched: np.ndarray = (1 - smooth) * base / scaling.factor + smooth * base
    return stretched.astype(np.float32)


def _yarn(base: np.ndarray, scaling: RopeScaling, rope_base: float) -> tuple[np.ndarray, float]:
    """Interpolates the dimensions that turn seldom over the original context, keeps those that turn often."""
    pairs, size = len(base), 2 * len(base)

    def pair_of(turns: float) -> float:
        original = scaling.original_positions
        ratio = math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope_base))
        return size * ratio

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), size - 1)
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    scaled = base / scaling.factor * ramp + base * (1 - ramp)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return scaled.astype(np.float32), attention


def rotations(config: DecoderConfig, kind: LayerKind, positions: jax.Array) -> Rotation | None:
    """How layers of a kind rotate queries and keys at ``positions``, (B, T) int32; None where they rotate none."""
    if config.positions != "rotary":
        return None
    speed, scale = frequencies(config, kind)
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(speed)[None, None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates pairs (i, i + R/2) of (B, T, heads, H) by the given angles, elements from R on are kept; same dtype."""
    cos, sin = rotation
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., size:]], axis=-1) if size < x.shape[-1] else turned
