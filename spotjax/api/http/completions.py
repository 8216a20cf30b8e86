"""``/v1/completions``: what its answers look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from spotjax.api.http.answers import Choice, Shapes
from spotjax.api.http.bodies import CompletionBody
from spotjax.api.http.logprobs import Offsets, TokenNames
from spotjax.api.validation import ServedModel
from spotjax.engine.generation import Delta


class Piece(msgspec.Struct, frozen=True):
    """A choice, or a piece of one."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class CompletionShapes(Shapes):
    """Of one call for completions.

    Args:
      seen: tokens that the client has of choices, if their log-probabilities are wanted.
    """

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self, base: str, model: ServedModel, body: CompletionBody, seen: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        super().__init__(base, model.name)
        self._tokenizer, self._seen = model.tokenizer, seen or {}
        self._names = TokenNames(model.tokenizer) if body.logprobs is not None else None
        self._offsets: dict[int, Offsets] = {}

    def opening(self, choice: int) -> None:
        """There is none."""

    def pieces(self, choice: int, delta: Delta) -> list[tuple[bool, Any]]:
        """One with all of it."""
        finish = delta.finish.value if delta.finish is not None else None
        logprobs = self._logprobs(choice, delta.tokens, delta.logprobs) if delta.tokens else None
        if not delta.text and logprobs is None and finish is None:
            return []
        return [(finish is not None, Piece(choice, delta.text, logprobs, finish))]

    def choice(self, number: int, choice: Choice) -> Any:
        """A whole text."""
        logprobs = self._logprobs(number, choice.tokens, choice.logprobs)
        return Piece(number, "".join(choice.text), logprobs, choice.finish)

    def _logprobs(self, number: int, tokens: Sequence[int], logprobs: Sequence[Any]) -> dict[str, Any] | None:
        if self._names is None:
            return None
        if number not in self._offsets:
            self._offsets[number] = Offsets(self._names, self._tokenizer, self._seen.get(number, ()))
        return self._offsets[number].piece(tokens, logprobs)
