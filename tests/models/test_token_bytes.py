"""The bytes of tokens, put together, are those of the text, for every way in which vocabularies write bytes."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from spotjax.models.token_bytes import TokenBytes, byte_alphabet

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = {word: token for token, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: letters, ``▁`` for a space, all else byte by byte."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(text=TEXTS)
def test_bytes_of_all_tokens_are_those_of_the_text(make: object, text: str) -> None:
    assert callable(make)
    tokenizer = make()
    ours = TokenBytes(tokenizer)
    text = text.replace("▁", "_")  # which stands for a space
    assert b"".join(ours[token] for token in tokenizer.encode(text).ids) == text.encode()


def test_a_part_of_a_character_is_its_byte() -> None:
    ours, fallback = TokenBytes(byte_level()), TokenBytes(byte_fallback())
    (alphabet,) = [byte_level().encode("\N{SNOWMAN}").ids]
    assert [ours[token] for token in alphabet] == [b"\xe2", b"\x98", b"\x83"]
    assert [fallback[token] for token in byte_fallback().encode("\N{SNOWMAN}").ids] == [b"\xe2", b"\x98", b"\x83"]


def test_the_alphabet_is_that_of_the_library() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_added_tokens_are_themselves_and_unknown_ones_nothing() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("Ġé", special=False)])
    ours = TokenBytes(tokenizer)
    end, plain = (tokenizer.token_to_id(text) for text in ("<|end|>", "Ġé"))
    assert (ours[end], ours[plain], ours[9999]) == (b"<|end|>", "Ġé".encode(), b"")


def test_with_another_decoder_the_bytes_are_those_of_the_text() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "he": 1, "##llo": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert TokenBytes(tokenizer)[1] == b"he"
    spaced = tokenizers.Tokenizer(models.Unigram([("▁he", 0.0)], 0))
    spaced.decoder = decoders.Metaspace()
    assert TokenBytes(spaced)[0] == b" he"
