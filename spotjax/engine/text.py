"""Takes a sequence one token further: text, stop texts, the reason to end. Pure functions of state and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from spotjax.engine.request import FinishReason, RequestState, Sampled

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4
"""Tokens before the new ones that are decoded with them, since a token's text may depend on its left neighbours."""
_LONGEST_CHARACTER = 8
"""Tokens after which text that still ends inside a character is broken for good and passed on as it is."""


class Detokenizer(Protocol):
    """Turns token ids into text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; an incomplete character at the end shows as U+FFFD."""
        ...


def advance(state: RequestState, sampled: Sampled, detokenizer: Detokenizer) -> RequestState:
    """The sequence with one more token, ended if that token ends it.

    End tokens and ``max_tokens`` end it after the token, stop texts at the place where they begin in the text.
    """
    tokens = (*state.tokens, sampled.token)
    logprobs = (*state.logprobs, sampled.logprobs) if sampled.logprobs is not None else state.logprobs
    reason = _reason(state, sampled.token, len(tokens))
    new, decoded = _decode(tokens, state.decoded, detokenizer)
    final, pending, stopped = split_at_stop(state.pending + new, state.sampling.stop)
    if stopped:
        reason = FinishReason.STOP
    elif reason is not None:
        final, pending = final + pending, ""
    text = state.text + final
    return replace(
        state,
        tokens=tokens,
        logprobs=logprobs,
        text=text,
        pending=pending,
        decoded=decoded,
        text_ends=(*state.text_ends, len(text)),
        finish=reason,
    )


def _reason(state: RequestState, token: int, count: int) -> FinishReason | None:
    ends_by_token = token in state.sampling.stop_token_ids
    ends_by_model = token in state.end_tokens and not state.sampling.ignore_eos
    if ends_by_token or ends_by_model:
        return FinishReason.STOP
    return FinishReason.LENGTH if count >= state.sampling.max_tokens else None


def _decode(tokens: tuple[int, ...], decoded: int, detokenizer: Detokenizer) -> tuple[str, int]:
    """Text of the tokens from ``decoded`` on, and how many tokens are decoded then; none while a character is incomplete."""
    start = max(0, decoded - _CONTEXT)
    before = detokenizer.decode(tokens[start:decoded]) if start < decoded else ""
    after = detokenizer.decode(tokens[start:])
    if after.endswith(_INCOMPLETE) and len(tokens) - decoded < _LONGEST_CHARACTER:
        return "", decoded
    return after[len(before) :], len(tokens)


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Splits text that may contain, or end in the beginning of, a stop text.

    Returns: (final text, held-back text, whether a stop text was found). What is held back is the longest end of the
      text that a stop text begins with.
    """
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    longest = max((len(stop) for stop in stops), default=1)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[:-length], text[-length:], False
    return text, "", False
