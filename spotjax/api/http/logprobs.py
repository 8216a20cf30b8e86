"""Log-probabilities as OpenAI's answers show them, for chats and, in an older form, for completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

from spotjax.api.prompt import Tokenizer
from spotjax.engine.request import Logprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TopToken(msgspec.Struct, frozen=True):
    """One of the most likely tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(msgspec.Struct, frozen=True):
    """The token that was chosen, and those that might have been."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken]


class TokenNames:
    """Tokens as text and bytes.

    Args:
      tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes; where these are no text by themselves, the text says which they are, as OpenAI's does."""
        told = self._tokenizer.token_bytes(token)
        return shown(told), list(told)

    def chat(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        """``logprobs`` of a choice of a chat."""
        content = []
        for token, entry in zip(tokens, logprobs, strict=True):
            text, told = self.of(token)
            top = [TopToken(name, max(p, LEAST), its) for number, p in entry.top for name, its in [self.of(number)]]
            content.append(ChosenToken(text, max(entry.token, LEAST), told, top))
        return {"content": content, "refusal": None}


class Offsets:
    """``logprobs`` of one choice of completions, piece by piece: where each token begins in the text is part of it.

    Args:
      names: of tokens.
      tokenizer: of the model.
      seen: tokens before the first piece.
    """

    def __init__(self, names: TokenNames, tokenizer: Tokenizer, seen: Sequence[int] = ()) -> None:
        self._names, self._tokenizer = names, tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = sum(len(self._text(token)) for token in seen)

    def _text(self, token: int) -> str:
        """What a token completes of the text."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def piece(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        """The next tokens' part. The chosen token is one of ``top_logprobs``, too, even if it is none of the best."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, logprobs, strict=True):
            text, _ = self._names.of(token)
            top = {self._names.of(number)[0]: max(p, LEAST) for number, p in entry.top}
            told["tokens"].append(text)
            told["token_logprobs"].append(max(entry.token, LEAST))
            told["top_logprobs"].append(top | {text: max(entry.token, LEAST)})
            told["text_offset"].append(self._length)
            self._length += len(self._text(token))
        return told


def shown(told: bytes) -> str:
    r"""Bytes as text, or as ``bytes:\xe2\x98`` where they are a part of a character."""
    try:
        return told.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in told)
