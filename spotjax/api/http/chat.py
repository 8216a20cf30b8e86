"""``/v1/chat/completions``: what its answers look like."""

from __future__ import annotations

from typing import Any

import msgspec

from spotjax.api.http.answers import Choice, Shapes
from spotjax.api.http.bodies import ChatBody
from spotjax.api.http.logprobs import TokenNames
from spotjax.api.validation import ServedModel
from spotjax.engine.generation import Delta


class Piece(msgspec.Struct, frozen=True):
    """A piece of a choice."""

    index: int
    delta: dict[str, str]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatShapes(Shapes):
    """Of one chat."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, base: str, model: ServedModel, body: ChatBody) -> None:
        super().__init__(base, model.name)
        self._names = TokenNames(model.tokenizer) if body.logprobs else None

    def opening(self, choice: int) -> Piece:
        """Says whose text it is."""
        return Piece(choice, {"role": "assistant", "content": ""})

    def pieces(self, choice: int, delta: Delta) -> list[tuple[bool, Any]]:
        """Text and log-probabilities in one piece, the end in another."""
        told: list[tuple[bool, Any]] = []
        logprobs = self._names.chat(delta.tokens, delta.logprobs) if self._names and delta.tokens else None
        if delta.text or logprobs is not None:
            told.append((False, Piece(choice, {"content": delta.text}, logprobs)))
        if delta.finish is not None:
            told.append((True, Piece(choice, {}, None, delta.finish.value)))
        return told

    def choice(self, number: int, choice: Choice) -> Any:
        """A whole message."""
        return {
            "index": number,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._names.chat(choice.tokens, choice.logprobs) if self._names else None,
            "finish_reason": choice.finish,
        }
