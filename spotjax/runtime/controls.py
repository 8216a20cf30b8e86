"""What sampling is told about each row of a step and what it returns, packed into one int32 array each way.

Packing and unpacking on the host; drawing tokens from them on the device is in ``sampling.py``. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from spotjax.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, Logprobs, RequestState, Sampled, SamplingParams
from spotjax.engine.structure import Masks

FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency",
    "seed_high", "seed_low", "choice", "position", "prompt_length", "length", "biases",
)  # fmt: skip
"""Columns of the packed (B, C) int32 controls, floats as their bits; bias ids, bias values and tokens follow."""


class Variant(StrEnum):
    """How much of sampling a step needs, least first."""

    GREEDY = "greedy"
    RANDOM = "random"
    FULL = "full"


def variant_for(rows: Sequence[SamplingParams]) -> Variant:
    """The least variant that serves all rows."""
    if all(row.plain_greedy for row in rows):
        return Variant.GREEDY
    return Variant.FULL if any(_needs_full(row) for row in rows) else Variant.RANDOM


def _needs_full(row: SamplingParams) -> bool:
    return row.penalised or bool(row.logit_bias) or row.logprobs is not None


def controls_width(variant: Variant, max_positions: int) -> int:
    """Columns of the packed controls."""
    return len(FIELDS) + (2 * MAX_LOGIT_BIAS + max_positions if variant is Variant.FULL else 0)


def mask_words(vocab: int) -> int:
    """32-bit words that a mask over the vocabulary takes."""
    return -(-vocab // 32)


def spread_masks(masks: Masks, rows: int) -> np.ndarray:
    """Masks of all rows of a step: rows without a structure may draw anything.

    Returns: (rows, W) int32, see ``sampling.restrict``.
    """
    words = np.full((rows, masks.words.shape[1]), -1, np.int32)
    words[list(masks.rows)] = masks.words
    return words


def pack_controls(
    states: Sequence[RequestState | None], variant: Variant, max_positions: int, positions: Sequence[int] | None = None
) -> np.ndarray:
    """One row of controls per row of the step, None for rows that draw nothing.

    Args:
      states: the sequences.
      variant: how tokens are drawn.
      max_positions: longest sequence.
      positions: of the tokens that are drawn, where other tokens come between them and those of the states, as may be
        where there are no penalties; None if there is no such row.

    Returns: (B, C) int32.
    """
    packed = np.zeros((len(states), controls_width(variant, max_positions)), np.int32)
    floats = packed.view(np.float32)
    for row, state in enumerate(states):
        if state is None:
            floats[row, 2] = floats[row, 4] = 1.0  # neutral top_p and repetition penalty
            continue
        s = state.sampling
        floats[row, :7] = (s.temperature, 0, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty,
                           s.frequency_penalty)  # fmt: skip
        packed[row, 1] = min(s.top_k, 2**31 - 1)
        seed = np.array([s.seed >> 32, s.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        position = state.length if positions is None else positions[row]
        packed[row, 7:14] = (*seed, state.choice, position, len(state.prompt), state.length, len(s.logit_bias))
        if variant is Variant.FULL:
            ids = len(FIELDS)
            values, tokens = ids + MAX_LOGIT_BIAS, ids + 2 * MAX_LOGIT_BIAS
            packed[row, ids : ids + len(s.logit_bias)] = list(s.logit_bias)
            floats[row, values : values + len(s.logit_bias)] = list(s.logit_bias.values())
            packed[row, tokens : tokens + state.length] = state.prompt + state.tokens
    return packed


def unpack(result: np.ndarray, states: Sequence[RequestState | None]) -> list[Sampled | None]:
    """Reads what ``sampling.sample`` returned: (B, 1) or (B, 2 + 2 * MAX_LOGPROBS) int32."""
    floats = result.view(np.float32)
    sampled: list[Sampled | None] = []
    for row, state in enumerate(states):
        if state is None:
            sampled.append(None)
            continue
        logprobs = None
        if (wanted := state.sampling.logprobs) is not None:
            ids = result[row, 2 : 2 + wanted].tolist()
            values = floats[row, 2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + wanted].tolist()
            logprobs = Logprobs(float(floats[row, 1]), tuple(zip(ids, values, strict=True)))
        sampled.append(Sampled(int(result[row, 0]), logprobs))
    return sampled
