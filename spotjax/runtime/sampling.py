"""Chooses the next token on the device: pure functions, so that any re-execution gives the same token.

Three variants, each compiled on its own: ``greedy`` (the most likely token), ``random`` (temperature and filters) and
``full`` (also penalties, logit bias and log-probabilities). A step uses the least that all its rows can do with; a row
gets the same token from every variant that can serve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, Logprobs, RequestState, Sampled, SamplingParams

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
    penalised = row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
    return penalised or bool(row.logit_bias) or row.logprobs is not None


def controls_width(variant: Variant, max_positions: int) -> int:
    """Columns of the packed controls."""
    return len(FIELDS) + (2 * MAX_LOGIT_BIAS + max_positions if variant is Variant.FULL else 0)


def pack_controls(states: Sequence[RequestState | None], variant: Variant, max_positions: int) -> np.ndarray:
    """One row of controls per row of the step, None for rows that draw nothing.

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
        packed[row, 7:14] = (*seed, state.choice, state.length, len(state.prompt), state.length, len(s.logit_bias))
        if variant is Variant.FULL:
            ids = len(FIELDS)
            values, tokens = ids + MAX_LOGIT_BIAS, ids + 2 * MAX_LOGIT_BIAS
            packed[row, ids : ids + len(s.logit_bias)] = list(s.logit_bias)
            floats[row, values : values + len(s.logit_bias)] = list(s.logit_bias.values())
            packed[row, tokens : tokens + state.length] = state.prompt + state.tokens
    return packed


def unpack(result: np.ndarray, states: Sequence[RequestState | None]) -> list[Sampled | None]:
    """Reads what ``sample`` returned: (B, 1) or (B, 2 + 2 * MAX_LOGPROBS) int32."""
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


@dataclass(frozen=True)
class Controls:
    """The packed controls, taken apart on the device: each field is (B,)."""

    packed: jax.Array

    def number(self, name: str) -> jax.Array:
        """An integer column."""
        return self.packed[:, FIELDS.index(name)]

    def real(self, name: str) -> jax.Array:
        """A float32 column."""
        return jax.lax.bitcast_convert_type(self.number(name), jnp.float32)

    @property
    def bias(self) -> tuple[jax.Array, jax.Array]:
        """Token ids and values, (B, MAX_LOGIT_BIAS) each."""
        start = len(FIELDS)
        ids = self.packed[:, start : start + MAX_LOGIT_BIAS]
        values = self.packed[:, start + MAX_LOGIT_BIAS : start + 2 * MAX_LOGIT_BIAS]
        return ids, jax.lax.bitcast_convert_type(values, jnp.float32)

    @property
    def tokens(self) -> jax.Array:
        """Prompt and output token ids, (B, max_positions)."""
        return self.packed[:, len(FIELDS) + 2 * MAX_LOGIT_BIAS :]


def sample(variant: Variant, logits: jax.Array, packed: jax.Array) -> jax.Array:
    """Draws one token per row.

    Args:
      logits: (B, V) float32.
      packed: (B, C) int32 from ``pack_controls``; unused by ``greedy``.

    Returns: (B, 1) int32 token ids; ``full`` adds the token's log-probability, the ids of the MAX_LOGPROBS most likely
      tokens and their log-probabilities, as float bits.
    """
    if variant is Variant.GREEDY:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
    controls = Controls(packed)
    shaped = logits
    if variant is Variant.FULL:
        shaped = _penalise(shaped, controls)
    chosen = _draw(shaped, controls)
    if variant is Variant.RANDOM:
        return chosen[:, None]
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, chosen[:, None], axis=1)
    top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - ids.shape[1]))
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in (own, jnp.pad(top, missing))]
    return jnp.concatenate([chosen[:, None], bits[0], jnp.pad(ids, missing), bits[1]], axis=1)


def _penalise(logits: jax.Array, controls: Controls) -> jax.Array:
    """Repetition (Keskar et al. 2019, prompt and output), presence and frequency (output only) penalties, then bias."""
    tokens, places = controls.tokens, jnp.arange(controls.tokens.shape[1], dtype=jnp.int32)[None, :]
    in_use = places < controls.number("length")[:, None]
    in_output = in_use & (places >= controls.number("prompt_length")[:, None])
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    empty = jnp.zeros_like(logits)
    seen = empty.at[rows, tokens].add(in_use.astype(jnp.float32))
    written = empty.at[rows, tokens].add(in_output.astype(jnp.float32))
    repetition = controls.real("repetition")[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, repeated, logits)
    logits = logits - controls.real("frequency")[:, None] * written
    logits = logits - controls.real("presence")[:, None] * (written > 0).astype(jnp.float32)
    ids, values = controls.bias
    given = jnp.arange(MAX_LOGIT_BIAS, dtype=jnp.int32)[None, :] < controls.number("biases")[:, None]
    return logits.at[rows, ids].add(jnp.where(given, values, jnp.float32(0)))


def _draw(logits: jax.Array, controls: Controls) -> jax.Array:
    """The most likely token where temperature is 0, else a draw by the Gumbel-max trick from what the filters keep."""
    temperature = controls.real("temperature")[:, None]
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.where(temperature > 0, temperature, jnp.float32(1))
    kept = _filter(scaled, controls)
    noise = jax.vmap(lambda *counters: _noise(logits.shape[1], *counters))(
        controls.number("seed_high"),
        controls.number("seed_low"),
        controls.number("choice"),
        controls.number("position"),
    )
    drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
    return jnp.where(temperature[:, 0] > 0, drawn, greedy)


def _noise(vocab: int, seed_high: jax.Array, seed_low: jax.Array, choice: jax.Array, position: jax.Array) -> jax.Array:
    """(V,) Gumbel noise that depends on (seed, choice, position) alone."""
    words = jnp.stack([seed_high, seed_low]).astype(jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, choice), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _filter(scaled: jax.Array, controls: Controls) -> jax.Array:
    """top-k, then top-p of what is left, then min-p; ties at a threshold are all kept. Dropped tokens become -inf."""
    top_k, top_p = controls.number("top_k")[:, None], controls.real("top_p")[:, None]
    order = _sortable(scaled)
    wanted = jnp.where(top_k > 0, top_k, scaled.shape[1]).astype(jnp.float32)
    ones = jnp.ones_like(scaled)
    scaled = jax.lax.cond(
        jnp.any(top_k > 0), lambda: _keep(scaled, order >= _threshold(order, ones, wanted)), lambda: scaled
    )
    mass = jax.nn.softmax(scaled, axis=-1)
    scaled = jax.lax.cond(
        jnp.any(top_p < 1),
        lambda: _keep(scaled, (order >= _threshold(order, mass, top_p)) | (top_p >= 1)),
        lambda: scaled,
    )
    least = jnp.log(controls.real("min_p"))[:, None] + jnp.max(scaled, axis=-1, keepdims=True)
    return _keep(scaled, scaled >= least)


def _keep(values: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, values, jnp.float32(-jnp.inf))


def _sortable(values: jax.Array) -> jax.Array:
    """float32 to uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest key such that the weights of all entries at or above it sum to at least ``wanted``.

    Found bit by bit from the top, 32 sums instead of a sort, which is far slower on every backend.

    Args:
      order: (B, V) uint32 keys.
      weights: (B, V) float32, not negative.
      wanted: (B, 1) float32.

    Returns: (B, 1) uint32; 0 where even all weights together fall short.
    """

    def decide(step: jax.Array, found: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        candidate = found | bit
        reached = jnp.sum(jnp.where(order >= candidate, weights, jnp.float32(0)), axis=-1, keepdims=True)
        return jnp.where(reached >= wanted, candidate, found)

    found: jax.Array = jax.lax.fori_loop(0, 32, decide, jnp.zeros((order.shape[0], 1), jnp.uint32))
    return found
