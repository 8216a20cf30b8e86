"""Reads the rotary settings of Hugging Face's ``config.json``; what cannot be computed exactly is refused by name."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec

from spotjax.models.config import RopeScaling

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class RopeParameters(msgspec.Struct, forbid_unknown_fields=True):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class Rope(NamedTuple):
    """What ``read_rope`` finds.

    Attributes:
      base: of the rotary frequencies.
      scaling: of the rotary frequencies, or None.
      fraction: of a head that is rotated.
    """

    base: float
    scaling: RopeScaling | None
    fraction: float


class RopeKeys(msgspec.Struct):
    """The keys of ``config.json`` that matter here; defaults are those of transformers."""

    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int | None = None


def read_rope(file: RopeKeys) -> Rope:
    """The rotary settings, in either spelling.

    Raises:
      ValueError: they cannot be computed exactly.
    """
    values = file.rope_scaling or file.rope_parameters or {}
    spelling = "rope_scaling" if file.rope_scaling else "rope_parameters"
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"{spelling} of type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    try:
        rope = msgspec.convert(values, RopeParameters, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{spelling}: {error}") from error
    if not rope.truncate:
        raise ValueError(f"{spelling}: truncate false is not supported")
    fraction = file.partial_rotary_factor if rope.partial_rotary_factor is None else rope.partial_rotary_factor
    return Rope(rope.rope_theta or file.rope_theta, _scaling(file, rope, spelling, kind), fraction)


def _scaling(file: RopeKeys, rope: RopeParameters, spelling: str, kind: str) -> RopeScaling | None:
    original = file.original_max_position_embeddings or rope.original_max_position_embeddings
    original = original or file.max_position_embeddings
    if kind == "default":
        return None
    factor = rope.factor
    if factor is None and kind == "yarn":
        factor = file.max_position_embeddings / original
    if factor is None:
        raise ValueError(f"{spelling} of type {kind} needs a factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        if rope.low_freq_factor is None or rope.high_freq_factor is None:
            raise ValueError(f"{spelling} of type llama3 needs low_freq_factor and high_freq_factor")
        return RopeScaling("llama3", factor, original, rope.low_freq_factor, rope.high_freq_factor)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: RopeParameters, factor: float) -> float | None:
    """YaRN's scale of attention, where ``mscale`` and ``mscale_all_dim`` may give it; None for the paper's."""
    if rope.attention_factor is None and rope.mscale and rope.mscale_all_dim and factor > 1:
        return (0.1 * rope.mscale * math.log(factor) + 1) / (0.1 * rope.mscale_all_dim * math.log(factor) + 1)
    return rope.attention_factor
