"""What prompts say: drawn words, drawn tokens, or lines of a file. Seeded; only the file and the tokenizer are read.

A prompt depends on the seed, its number and its length only, so that every server is asked the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import tokenizers

from spotjax.errors import ConfigError

Text: TypeAlias = str | tuple[int, ...]
ATTEMPTS = 10

WORDS = tuple(
    """
the of and to in is that for it was on are as with they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before go
good new write our used me man too any day same right look think also around another came come work three word must
because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never
us left end along while might next sound below saw something thought both few those always looked show large often
together asked house world going want school important until form food keep children feet land side without boy once
animals life enough took sometimes four head above kind began almost live page got earth need far hand high year
mother light parts country father let night following picture
    """.split()  # noqa: SIM905
)
"""Common words, each of which is one token in most vocabularies when it follows a space."""


class Prompts(Protocol):
    """Where prompts come from."""

    def draw(self, tokens: int, random: np.random.Generator) -> tuple[Text, int | None]:
        """A prompt of about so many tokens, and how many it has as far as is known."""
        ...


@dataclass(frozen=True)
class Words:
    """Text of common words, about one token each; how many exactly is for the server to say."""

    def draw(self, tokens: int, random: np.random.Generator) -> tuple[Text, int | None]:
        """See ``Prompts``."""
        return " ".join(WORDS[number] for number in random.integers(len(WORDS), size=tokens)), tokens


@dataclass(frozen=True)
class TokenIds:
    """Token ids drawn from a vocabulary: any length exactly, no tokenizing anywhere."""

    ids: Sequence[int]

    def draw(self, tokens: int, random: np.random.Generator) -> tuple[Text, int | None]:
        """See ``Prompts``."""
        return tuple(self.ids[number] for number in random.integers(len(self.ids), size=tokens)), tokens


@dataclass(frozen=True, eq=False)
class TokenText:
    """Text of random tokens of a tokenizer. Tokens may join into others, so what is said is the length of the text."""

    vocabulary: Vocabulary

    def draw(self, tokens: int, random: np.random.Generator) -> tuple[Text, int | None]:
        """See ``Prompts``."""
        ids = self._drawn(tokens, random)
        for _ in range(ATTEMPTS):
            text = self.vocabulary.decode(ids)
            ids = self.vocabulary.encode(text)
            if len(ids) == tokens:
                break
            ids = ids[:tokens] + self._drawn(tokens - len(ids), random)
        return text, self.vocabulary.count(text)

    def _drawn(self, count: int, random: np.random.Generator) -> list[int]:
        ids = self.vocabulary.textual
        return [ids[number] for number in random.integers(len(ids), size=max(count, 0))]


class Vocabulary:
    """A model's tokenizer, as far as prompts and counting need it.

    Attributes:
      usable: ids of all tokens that are not special.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.usable = tuple(sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()) - special))

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """From ``tokenizer.json``, or a directory that has one.

        Raises:
          ConfigError: there is none, or it cannot be read.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as problem:  # the library raises nothing more specific
            raise ConfigError(f"--tokenizer: {file} cannot be read: {problem}") from problem

    @functools.cached_property
    def textual(self) -> tuple[int, ...]:
        """Ids of those whose text alone is read as that token again; parts of characters are not."""
        texts = self._tokenizer.decode_batch([[number] for number in self.usable], skip_special_tokens=True)
        read = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        same = tuple(number for number, found in zip(self.usable, read, strict=True) if found.ids == [number])
        return same or self.usable

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))


class GivenPrompt(NamedTuple):
    """A prompt from a file.

    Attributes:
      output_tokens: most new tokens, where the file says so.
    """

    text: str
    output_tokens: int | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    output_tokens: int | None = None


def read_prompts(path: Path) -> list[GivenPrompt]:
    """Prompts of a file: lines of text, or with the suffix ``.jsonl`` objects of ``prompt`` and ``output_tokens``.

    Raises:
      ConfigError: it cannot be read, has no prompt, or a line is bad.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"--prompts: {path} cannot be read: {problem}") from problem
    parse: Callable[[str], GivenPrompt] = _json_line if path.suffix == ".jsonl" else GivenPrompt
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(parse(line))
            except (ValueError, msgspec.MsgspecError) as problem:
                raise ConfigError(f"--prompts: {path}, line {number}: {problem}") from problem
    if not prompts:
        raise ConfigError(f"--prompts: {path} has no prompts")
    return prompts


def _json_line(line: str) -> GivenPrompt:
    found = msgspec.json.decode(line, type=_Line)
    if not found.prompt or (found.output_tokens is not None and found.output_tokens < 1):
        raise ValueError("prompt must not be empty, output_tokens at least 1")
    return GivenPrompt(found.prompt, found.output_tokens)
