"""The end of a step on the last stage: tokens are drawn from its logits, within structures where rows have one."""

from __future__ import annotations

import jax
import numpy as np

from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.controls import Variant
from spotjax.runtime.step import PackedStep


def draw(
    model: CompiledModel,
    device: jax.Device,
    step: PackedStep,
    logits: jax.Array,
    masks: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Begins to draw; returns at once.

    Args:
      model: compiled functions.
      device: that has the logits.
      step: which is run.
      logits: (B, V) float32, of the model.
      masks: (B, W) int32 of a step that has some, see ``sampling.restrict``.

    Returns: what ``sampling.sample`` and ``sampling.drawn_tokens`` do.
    """
    rows, restricted = step.shape.rows, logits
    controls = jax.device_put(step.controls, device)
    if masks is not None:
        restricted = model.restrict(device, rows)(logits, jax.device_put(masks, device))
    result: jax.Array
    result, tokens = model.sample(device, step.variant, rows)(restricted, controls)
    if masks is not None and step.variant is Variant.FULL:
        result = model.with_logprobs(device, rows)(logits, tokens)
    return result, tokens
