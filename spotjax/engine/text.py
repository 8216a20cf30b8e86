"""Takes a sequence one token further: text, stop texts, the reason to end. Pure functions of state and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from spotjax.engine.request import FinishReason, RequestState, Sampled

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4
"""Tokens before the new ones that are decoded with them, since a token's text may depend on its left neighbours."""
_LONGEST_CHARACTER = 4
"""Tokens that a character takes at most: one byte each."""


class Detokenizer(Protocol):
    """Turns token ids into text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; an incomplete character at the end shows as U+FFFD."""
        ...


def advance(state: RequestState, sampled: Sampled, detokenizer: Detokenizer, *, complete: bool = False) -> RequestState:
    """The sequence with one more token, ended if that token ends it.

    End tokens and ``max_tokens`` end it after the token, stop texts at the place where they begin in the text. A
    character that is incomplete when the sequence ends is shown as U+FFFD.

    Args:
      complete: whether the token completes the sequence's structure, which ends it.
    """
    tokens = (*state.tokens, sampled.token)
    logprobs = (*state.logprobs, sampled.logprobs) if sampled.logprobs is not None else state.logprobs
    reason = FinishReason.STOP if complete else _reason(state, sampled.token, len(tokens))
    new, decoded = _decode(tokens, state.decoded, detokenizer, last=reason is not None)
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


def _decode(tokens: tuple[int, ...], decoded: int, detokenizer: Detokenizer, *, last: bool) -> tuple[str, int]:
    """Text from token ``decoded`` on, and how many tokens are decoded then; no text while a character is incomplete."""
    start, end = max(0, decoded - _CONTEXT), len(tokens)
    before = detokenizer.decode(tokens[start:decoded]) if start < decoded else ""
    after = detokenizer.decode(tokens[start:])
    if after.endswith(_INCOMPLETE) and not last:
        end = max(decoded, len(tokens) - _LONGEST_CHARACTER + 1)
        broken = detokenizer.decode(tokens[start:end]) if start < end else ""
        if end == decoded or not after.startswith(broken):
            return "", decoded
        after = broken  # the tokens that came since did not complete its last character, so none will
    return after[len(before) :], end


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Splits text that may contain, or end in the beginning of, a stop text.

    Of several stop texts the one that is complete first counts, of those the longest, so that the outcome does not
    depend on how the text is cut into tokens.

    Returns: (final text, held-back text, whether a stop text was found). What is held back is the longest end of the
      text that a stop text begins with.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        _, start = min(found)
        return text[:start], "", True
    longest = max((len(stop) for stop in stops), default=1)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[:-length], text[-length:], False
    return text, "", False
