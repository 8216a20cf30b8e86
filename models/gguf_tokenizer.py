"""Builds the tokenizer that a GGUF file's metadata describes: byte-level BPE with the word patterns of known models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from spotjax.errors import CheckpointError
from spotjax.models.chat import ChatTemplate
from spotjax.models.tokenizer import Tokenizer

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How the named model's text is cut into words, as in its ``tokenizer.json``."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match name:
        case "gpt-2":
            return gpt2
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        case "llama-bpe":
            return _words(LLAMA3_WORDS)
        case "qwen2":
            return _words(QWEN2_WORDS)
    raise CheckpointError(
        f"tokenizer.ggml.pre {name!r} is not supported, only gpt-2, smollm, llama-bpe, qwen2; "
        "use the model's Hugging Face directory"
    )


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises:
      CheckpointError: it is of a kind that is not supported, or incomplete.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 (byte-level BPE)")
    try:
        words, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    except KeyError as error:
        raise CheckpointError(f"the GGUF metadata has no {error.args[0]}") from error
    family = metadata.get("tokenizer.ggml.pre", "gpt-2")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {word: token for token, word in enumerate(words)}
    # Llama 3 takes a word that is in the vocabulary as it is, even where merges would not lead to it.
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=family == "llama-bpe"))
    bpe.pre_tokenizer = _pre_tokenizer(family)
    bpe.decoder = decoders.ByteLevel()
    if family == "qwen2":
        bpe.normalizer = normalizers.NFC()
    types = metadata.get("tokenizer.ggml.token_type", [])
    for word, token_type in zip(words, types, strict=False):
        if token_type in (TokenType.CONTROL, TokenType.USER_DEFINED):
            special = token_type == TokenType.CONTROL
            bpe.add_tokens([AddedToken(word, special=special, normalized=False)])
    _add_ends(bpe, metadata, words, adds_bos=family == "llama-bpe")

    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        bpe,
        frozenset(token for token in ends if token is not None),
        ChatTemplate(template, _special_tokens(metadata, words)) if template is not None else None,
    )


def _special_tokens(metadata: Mapping[str, Any], words: list[str]) -> dict[str, str]:
    """Special tokens by the names that chat templates use."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: words[token] for name, token in tokens.items() if token is not None}


def _add_ends(bpe: tokenizers.Tokenizer, metadata: Mapping[str, Any], words: list[str], adds_bos: bool) -> None:
    """Makes ``bpe`` put the first and the last token around a text where the metadata says so."""
    special = _special_tokens(metadata, words)
    first = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    last = metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [special.get("bos_token") if first else None, "$A", special.get("eos_token") if last else None]
    parts = [part for part in around if part is not None]
    if len(parts) > 1:
        ids = [(part, bpe.token_to_id(part)) for part in parts if part != "$A"]
        bpe.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ids)
