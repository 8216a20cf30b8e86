"""What ``ScriptedService`` generates: tokens as a pure function of prompt, seed, choice and position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from spotjax.engine.generation import Delta, GenerationRequest, Usage
from spotjax.engine.request import FinishReason, Logprobs


def scripted_token(prompt: Sequence[int], seed: int, choice: int, position: int) -> int:
    """The token that ``ScriptedService`` generates there: always the byte of a lower-case letter."""
    key = repr((tuple(prompt), seed, choice, position)).encode()
    return ord("a") + hashlib.blake2b(key, digest_size=1).digest()[0] % 26


def scripted_tokens(request: GenerationRequest, choice: int) -> tuple[tuple[int, ...], str, FinishReason]:
    """All tokens of a choice, its text and why it ends, as the engine would have it: stop text and all."""
    sampling = request.sampling
    tokens: list[int] = []
    for position in range(sampling.max_tokens):
        tokens.append(scripted_token(request.prompt, sampling.seed, choice, position))
        text = bytes(tokens).decode()
        for stop in sampling.stop:
            if text.endswith(stop):
                return tuple(tokens), text.removesuffix(stop), FinishReason.STOP
        if tokens[-1] in sampling.stop_token_ids:
            return tuple(tokens), text[:-1], FinishReason.STOP
    return tuple(tokens), bytes(tokens).decode(), FinishReason.LENGTH


@dataclass
class ScriptedRequest:
    """An accepted request and how far it is.

    Attributes:
      request: as accepted.
      script: per choice: tokens, text, finish reason.
      committed: tokens that streams may show, the same for every choice (shorter ones ended before).
      ended: set when it was cancelled.
    """

    request: GenerationRequest
    script: list[tuple[tuple[int, ...], str, FinishReason]]
    committed: int = 0
    ended: FinishReason | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        return self.ended is not None or self.committed >= max(len(tokens) for tokens, _, _ in self.script)

    def delta(self, choice: int, offset: int) -> Delta | None:
        """What a stream that has seen ``offset`` tokens of a choice gets next, or None if there is nothing yet."""
        tokens, text, reason = self.script[choice]
        known = min(self.committed, len(tokens))
        finish = reason if known == len(tokens) else self.ended
        if known == offset and finish is None:
            return None
        sampling = self.request.sampling
        entry = Logprobs(-1.0, tuple((token, -1.0 - token) for token in range(sampling.logprobs or 0)))
        return Delta(
            request_id=self.request.request_id,
            choice=choice,
            offset=offset,
            tokens=tokens[offset:known],
            text=text[offset:known],
            logprobs=() if sampling.logprobs is None else (entry,) * (known - offset),
            finish=finish,
            usage=None if finish is None else Usage(len(self.request.prompt), known),
        )
