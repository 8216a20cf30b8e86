"""Chooses the next token on the device: pure functions, so that any re-execution gives the same token.

Three variants, each compiled on its own: ``greedy`` (the most likely token), ``random`` (temperature and filters) and
``full`` (also penalties, logit bias and log-probabilities). A step uses the least that all its rows can do with; a row
gets the same token from every variant that can serve it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spotjax.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS
from spotjax.runtime.controls import FIELDS, Variant

_WIDTH = 128
_BLOCK = 256


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
      packed: (B, C) int32 from ``controls.pack_controls``; unused by ``greedy``.

    Returns: (B, 1) int32 token ids; ``full`` adds the token's log-probability, the ids of the MAX_LOGPROBS most likely
      tokens and their log-probabilities, as float bits.
    """
    if variant is Variant.GREEDY:
        return most_likely(logits)[:, None]
    controls = Controls(packed)
    shaped = logits
    if variant is Variant.FULL:
        shaped = _penalise(shaped, controls)
    chosen = _draw(shaped, controls)
    return chosen[:, None] if variant is Variant.RANDOM else with_logprobs(logits, chosen)


def restrict(logits: jax.Array, words: jax.Array) -> jax.Array:
    """Leaves the logits of some tokens only: the others become -inf, which no other part of sampling changes.

    Args:
      logits: (B, V) float32.
      words: (B, W) int32, see ``engine.structure.Masks``.

    Returns: (B, V) float32.
    """
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1
    return _keep(logits, bits.reshape(len(words), -1)[:, : logits.shape[1]] == 1)


def with_logprobs(logits: jax.Array, chosen: jax.Array) -> jax.Array:
    """What ``sample`` returns for ``full``: tokens, and log-probabilities of the model's own distribution.

    Args:
      logits: (B, V) float32, of the model.
      chosen: (B,) int32 token ids.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, chosen[:, None], axis=1)
    top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - ids.shape[1]))
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in (own, jnp.pad(top, missing))]
    return jnp.concatenate([chosen[:, None], bits[0], jnp.pad(ids, missing), bits[1]], axis=1)


def drawn_width(rows: int) -> int:
    """Length of what ``drawn_tokens`` returns for so many rows: the same for nearly all steps."""
    return rows + -rows % _WIDTH


def drawn_tokens(result: jax.Array) -> jax.Array:
    """The tokens alone of ``sample``'s (B, R) result, for ``fill_in``: (W,) int32, padded with zeros."""
    return jnp.pad(result[:, 0], (0, drawn_width(len(result)) - len(result)))


def fill_in(rows: jax.Array, drawn: jax.Array) -> jax.Array:
    """Puts tokens that another step has drawn into the rows of a decode step.

    Args:
      rows: (B, 3) int32: position, length, and a token id or ``engine.batch.ahead`` of the other step's row.
      drawn: (W,) int32, see ``drawn_tokens``.

    Returns: (B, 3) int32, see ``kv.StepInput``.
    """
    tokens = rows[:, 2]
    return rows.at[:, 2].set(jnp.where(tokens < 0, drawn[-1 - tokens], tokens))


def most_likely(scores: jax.Array) -> jax.Array:
    """The place of each row's largest score, the first of equals: ``argmax``, found in two steps.

    XLA's CPU backend goes through an argmax one score at a time, but takes the maxima of blocks many at once.

    Args:
      scores: (B, V) float32.

    Returns: (B,) int32.
    """
    missing = -scores.shape[1] % _BLOCK
    blocks = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf).reshape(len(scores), -1, _BLOCK)
    best = jnp.argmax(jnp.max(blocks, axis=2), axis=1).astype(jnp.int32)
    chosen = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return best * _BLOCK + jnp.argmax(chosen, axis=1).astype(jnp.int32)


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
    greedy = most_likely(logits)
    scaled = logits / jnp.where(temperature > 0, temperature, jnp.float32(1))
    kept = _filter(scaled, controls)
    noise = jax.vmap(lambda *counters: _noise(logits.shape[1], *counters))(
        controls.number("seed_high"),
        controls.number("seed_low"),
        controls.number("choice"),
        controls.number("position"),
    )
    drawn = most_likely(kept + noise)
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
