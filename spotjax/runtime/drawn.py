"""What recent steps of a pipeline drew, on its device, for the steps that follow them before the host has read it."""

from __future__ import annotations

from collections import OrderedDict

import jax
import numpy as np

from spotjax.runtime.compiled import CompiledModel


class Drawn:
    """Tokens by step. For one thread at a time.

    Args:
      model: compiled functions.
      steps: how many are in flight at most, of which a step may follow any.
    """

    def __init__(self, model: CompiledModel, steps: int) -> None:
        self._model, self._steps = model, steps
        self._tokens: OrderedDict[int, jax.Array] = OrderedDict()

    def keep(self, step: int, tokens: jax.Array) -> None:
        """Takes what a step drew, see ``sampling.drawn_tokens``; it may still be being computed."""
        self._tokens[step] = tokens
        if len(self._tokens) > self._steps:
            self._tokens.popitem(last=False)

    def fill_in(self, rows: np.ndarray, follows: int, device: jax.Device) -> jax.Array:
        """The rows of a step that follows another, complete, on ``device``; returns before they are computed.

        Args:
          rows: (B, 3) int32, see ``sampling.fill_in``.
          follows: the other step.
          device: of the first stage.
        """
        tokens = self._tokens[follows]
        fill_in = self._model.fill_in(device, len(rows), len(tokens))
        filled: jax.Array = fill_in(*jax.device_put((rows, tokens), device))
        return filled
