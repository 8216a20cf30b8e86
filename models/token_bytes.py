"""The bytes that a token stands for, which its text does not always show: a character may take several tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import tokenizers

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: printable Latin-1 as it is, others from U+0100 on.

    Source: ``bytes_to_unicode`` of OpenAI's GPT-2, which the ByteLevel pre-tokenizer of ``tokenizers`` follows.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TokenBytes:
    """Bytes by token id, worked out as they are asked for.

    Args:
      tokenizer: whose decoder says how its vocabulary writes bytes: byte-level, or text with blanks and single bytes
        written out. With any other decoder, a token's bytes are those of its text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
        parts = {part["type"]: part for part in _parts(msgspec.json.decode(state))}
        self._alphabet = byte_alphabet() if "ByteLevel" in parts else None
        self._single = "ByteFallback" in parts
        self._blank = _blank(parts)
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """Of a token; none where there is no such token."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        word = self._tokenizer.id_to_token(token)
        if word is None:
            return b""
        if self._alphabet is not None and all(character in self._alphabet for character in word):
            return bytes(self._alphabet[character] for character in word)
        if self._single and (byte := BYTE.fullmatch(word)):
            return bytes([int(byte[1], 16)])
        if self._blank:
            return word.replace(self._blank, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()


def _parts(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A decoder, or those that it consists of."""
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif "type" in decoder:
        yield decoder


def _blank(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands for a space; empty if nothing does."""
    if "Metaspace" in parts:
        return str(parts["Metaspace"]["replacement"])
    replaced = parts.get("Replace", {})
    if replaced.get("content") == " " and isinstance(replaced["pattern"].get("String"), str):
        return str(replaced["pattern"]["String"])
    return ""
