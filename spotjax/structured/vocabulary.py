"""A model's tokens as the bytes that grammars are matched against. Which tokenizers that works for is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from llguidance import LLTokenizer

from spotjax.errors import InvalidRequest

NECESSARY = "\t\n" + "".join(map(chr, range(0x20, 0x7F)))
"""Characters that must be tokens by themselves, or a grammar could lead to where no token goes on."""
PROBE = '{"a_key": [1, -2.5e3, true, null],\n\t"na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve": "\N{SNOWMAN} \\" \\\\"}'
"""Text whose tokens must have its bytes."""


class Tokenizer(Protocol):
    """What is needed of a model's tokenizer."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Its files by name, among them ``tokenizer.json``."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        ...


class Vocabulary:
    """A model's tokens. Takes about a second to make where there are many.

    Args:
      tokenizer: of the model.
      vocab: logits of the model; there may be more than tokens.

    Attributes:
      tokens: what llguidance knows of them.
      end_tokens: those that end a text.
      words: 32-bit words of a mask over all logits.
      filled: the same of a mask that llguidance fills, at least as many.
      ends: (words,) int32, the bits of end tokens.
      blanks: the bits of tokens that lose a space where the text begins with them; none of them in most vocabularies.

    Raises:
      InvalidRequest: no structure can be kept to with this tokenizer; says why.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.end_tokens, self.words = frozenset(tokenizer.end_tokens), -(-vocab // 32)
        tokens, ends = max(vocab, tokenizer.vocab_size), sorted(tokenizer.end_tokens)
        if not ends:
            raise _unsuitable("it has no end token")
        self.filled = -(-tokens // 32)
        try:
            self.tokens = LLTokenizer(tokenizer.files()["tokenizer.json"].decode(), n_vocab=tokens, eos_token=ends)
        except ValueError as problem:
            raise _unsuitable(str(problem)) from problem
        if missing := [character for character in NECESSARY if not self._has(character)]:
            raise _unsuitable(f"{missing[0]!r} is no token")
        probe = self.tokens.decode_bytes(tokenizer.encode(PROBE, add_special_tokens=False))
        if not probe.decode("utf-8", "replace").endswith(PROBE):  # some put a space in front
            raise _unsuitable("its tokens are not the bytes of the text that they stand for")
        self.ends = self.bits(self.end_tokens)
        begun = [token for token in range(tokenizer.vocab_size) if self.bytes_of(token)[:1] == b" "]
        self.blanks = self.bits(begun if not tokenizer.decode(begun[:1]).startswith(" ") else ())

    def bits(self, tokens: Iterable[int]) -> np.ndarray:
        """(words,) int32 with the bits of some tokens set."""
        bits = np.zeros(32 * self.words, np.uint8)
        bits[[token for token in tokens if token < len(bits)]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing where it is a special one."""
        return b"" if self.tokens.is_special_token(token) else self.tokens.decode_bytes([token])

    def _has(self, character: str) -> bool:
        tokens = self.tokens.greedy_tokenize(character)
        return len(tokens) == 1 and self.bytes_of(tokens[0]) == character.encode()


def _unsuitable(why: str) -> InvalidRequest:
    return InvalidRequest("sampling.structure", f"the model's tokenizer cannot be kept to a structure: {why}")
