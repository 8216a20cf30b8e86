"""Tokenizers that grammars are matched over, and a slow way to say what a regular expression allows next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from spotjax.engine.structure import GuidedRow, Masks, Structure, StructureKind, Tokens
from spotjax.models.catalog import open_model
from spotjax.models.tokenizer import Tokenizer
from spotjax.structured.grammars import Grammars
from spotjax.structured.guide import SequenceMatcher, StructureGuide
from spotjax.structured.vocabulary import Vocabulary


@cache
def tiny() -> Tokenizer:
    """The shipped model's: byte-level BPE of 2048 tokens."""
    return open_model("tiny").tokenizer


def sentencepiece(words: Sequence[str] = ("ab", " ab", " a", ' "', "yes", " yes")) -> Tokenizer:
    """A tokenizer like Llama 2's: spaces are part of words, all bytes are tokens, text begins with a space."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [chr(code) for code in range(0x21, 0x7F)] + ["\u2581"]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = list(word.replace(" ", "\u2581"))
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            names.append(pieces[0])
    vocabulary = {name: token for token, name in enumerate(dict.fromkeys(names))}
    library = Library(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(library, frozenset({2}))


def bytes_only(missing: str = "") -> Tokenizer:
    """Byte-level tokens for single bytes, those of some characters left out, and an end token."""
    vocabulary = {piece: n for n, piece in enumerate(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(missing)))}
    library = Library(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<end>"])
    return Tokenizer(library, frozenset({library.token_to_id("<end>")}))


@cache
def guide(name: str = "tiny", vocab: int = 0) -> StructureGuide:
    """A guide over one of these tokenizers."""
    tokenizer = {"tiny": tiny, "sentencepiece": sentencepiece, "bytes": bytes_only}[name]()
    return StructureGuide(Grammars(lambda: Vocabulary(tokenizer, vocab or tokenizer.vocab_size)))


def regex(pattern: str) -> Structure:
    return Structure(StructureKind.REGEX, pattern)


def masks(guide: StructureGuide, *rows: tuple[SequenceMatcher, Tokens]) -> Masks:
    """Masks of rows 0, 1, ..."""
    return guide.masks({row: GuidedRow(*one) for row, one in enumerate(rows)}).result(30)


def allowed(words: np.ndarray) -> set[int]:
    """The tokens whose bits are set."""
    return {token for token in range(32 * len(words)) if int(words[token // 32]) >> token % 32 & 1}


def text_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each token stands for, by the library's own decoder; None for special tokens and single bytes of others."""
    found: list[bytes | None] = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        found.append(text.encode() if text and "\ufffd" not in text else None)
    return found


def may_begin(pattern: str, text: str, alphabet: str, longest: int) -> bool:
    """Whether some text of up to ``longest`` characters more than ``text`` matches; tries them all."""
    matches = re.compile(pattern).fullmatch
    level = [text]
    for _ in range(longest + 1):
        if any(matches(candidate) for candidate in level):
            return True
        level = [candidate + character for candidate in level for character in alphabet]
    return False
