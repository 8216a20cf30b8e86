"""Tokenizers of Hugging Face directories and of GGUF metadata, and chat templates."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from spotjax.errors import CheckpointError, InvalidRequest
from spotjax.models.chat import ChatTemplate
from spotjax.models.gguf_tokenizer import gguf_tokenizer
from spotjax.models.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|bos|>", "<|end|>", "<|turn|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
WORDS = [*BYTES, *("".join(merge) for merge in MERGES)]
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_directory(directory: Path, **files: dict[str, Any]) -> Path:
    """A byte-level BPE ``tokenizer.json`` that begins texts with <|bos|>, and further JSON files."""
    bpe = tokenizers.Tokenizer(models.BPE({word: token for token, word in enumerate(WORDS)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bpe.token_to_id("<|bos|>"))]
    )
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


BOS, END, TURN = (len(WORDS) + number for number in range(3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_directory(tmp_path_factory.mktemp("tokenizer")))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text))
def test_decoding_gives_the_text_that_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_texts_are_neither_cut_nor_padded(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("x" * 100, add_special_tokens=False)) == 100
    assert len(tokenizer.encode("x", add_special_tokens=False)) == 1


def test_special_tokens_are_added_when_asked_for_and_never_decoded(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert plain == [WORDS.index("hello")]
    assert tokenizer.encode("hello", add_special_tokens=True) == [BOS, *plain]
    assert tokenizer.encode("<|turn|>hello", add_special_tokens=False) == [TURN, *plain]
    assert tokenizer.decode([BOS, *plain, TURN, END]) == "hello"


def test_an_unfinished_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a€", add_special_tokens=False)
    assert [tokenizer.decode(tokens[:count]) for count in range(1, 5)] == ["a", "a�", "a�", "a€"]
    assert tokenizer.decode([]) == ""


def test_vocabulary_counts_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == len(WORDS) + len(SPECIAL)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config": {"eos_token_id": 7}}, {7}),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [7, 9]}}, {7, 9}),
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "config": {"eos_token_id": 7}}, {7, END}),
        ({"tokenizer_config": {"eos_token": {"content": "<|turn|>", "lstrip": False}}}, {TURN}),
        ({"tokenizer_config": {"eos_token": None}}, set()),
    ],
)
def test_end_tokens_are_all_that_the_files_name(tmp_path: Path, files: dict[str, Any], ends: set[int]) -> None:
    assert Tokenizer.from_directory(write_directory(tmp_path, **files)).end_tokens == ends


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config": {"eos_token_id": "two"}}, "eos_token_id"),
        ({"tokenizer_config": {"eos_token": "<|gone|>"}}, "<|gone|>"),
        ({"tokenizer_config": {"chat_template": "{% if %}"}}, "chat template is not valid in line 1"),
        ({"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "x"}]}}, "'default'"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template must be text"),
        ({"generation_config": ["no object"]}, "generation_config.json"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, files: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        Tokenizer.from_directory(write_directory(tmp_path, **files))
    assert named in str(raised.value)


def test_a_missing_or_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json does not exist"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        Tokenizer.from_directory(tmp_path)


MESSAGES = [{"role": "user", "content": "hi <b>"}]


def test_chats_are_rendered_up_to_the_answer(tmp_path: Path) -> None:
    settings = {"chat_template": CHATML, "eos_token": {"content": "<|end|>"}}
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, tokenizer_config=settings))
    assert tokenizer.render_chat(MESSAGES) == "<|user|>hi <b><|end|>\n<|assistant|>"


def test_the_template_file_goes_before_the_settings_and_default_before_others(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    write_directory(tmp_path, tokenizer_config={"chat_template": named})
    assert Tokenizer.from_directory(tmp_path).render_chat(MESSAGES) == "default"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).render_chat(MESSAGES) == "file"


def test_without_a_template_messages_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as raised:
        tokenizer.render_chat(MESSAGES)
    assert raised.value.field == "messages"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "hi <b>\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'ö': '<'} | tojson }}", '{"ö": "<"}'),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ bos_token }}{{ eos_token is defined }}", "<s>False"),
        ("{% if tools %}tools{% endif %}{% if documents is none %}-{% endif %}", "-"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, text: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3]['content'] }}", "no element 3"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "range|Range"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_an_invalid_request(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        ChatTemplate(source, {}).render(MESSAGES)
    assert raised.value.field == "messages"


METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*WORDS, *SPECIAL],
    "tokenizer.ggml.token_type": [1] * len(WORDS) + [3, 3, 4],
    "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
    "tokenizer.ggml.bos_token_id": BOS,
    "tokenizer.ggml.eos_token_id": END,
    "tokenizer.ggml.eot_token_id": TURN,
    "tokenizer.chat_template": CHATML,
}


def test_gguf_metadata_gives_the_tokenizer_of_the_directory(tokenizer: Tokenizer) -> None:
    ours = gguf_tokenizer(METADATA)
    for text in ("hello world", "hell<|bos|>o  w\n", "ça €", ""):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == tokens
        assert ours.decode(tokens) == tokenizer.decode(tokens)
    assert (ours.end_tokens, ours.vocab_size) == ({END, TURN}, tokenizer.vocab_size)
    assert ours.render_chat(MESSAGES) == "<|user|>hi <b><|end|>\n<|assistant|>"


def test_gguf_control_tokens_are_not_decoded_but_user_defined_ones_are() -> None:
    assert gguf_tokenizer(METADATA).decode([BOS, TURN, END]) == "<|turn|>"


@pytest.mark.parametrize(
    ("family", "text", "words"),
    [
        ("gpt-2", "it's 123 ab", ["it", "'s", " 123", " ab"]),
        ("smollm", "it's 123 ab", ["it", "'s", " ", "1", "2", "3", " ab"]),
        ("llama-bpe", "It'S 12345 .ab", ["It", "'S", " ", "123", "45", " .", "ab"]),
        ("qwen2", "It'S 12 .ab\n\n x", ["It", "'S", " ", "1", "2", " .", "ab", "\n\n", " x"]),
    ],
)
def test_gguf_text_is_cut_into_words_as_the_model_was_trained(family: str, text: str, words: list[str]) -> None:
    """Every word is in the vocabulary by merges of its letters, so each becomes one token."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [byte_level.pre_tokenize_str(word)[0][0] for word in words]
    pairs = [(piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))]
    pairs += pairwise(pieces)  # would join words that are not cut apart
    vocabulary = dict.fromkeys([*BYTES, *map("".join, pairs)])
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": family,
        "tokenizer.ggml.tokens": list(vocabulary),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    tokens = gguf_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False}).encode(text, add_special_tokens=True)
    assert [gguf_tokenizer(metadata).decode([token]) for token in tokens] == words


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({}, ([], [])),
        ({"tokenizer.ggml.add_bos_token": True}, ([BOS], [])),
        ({"tokenizer.ggml.add_eos_token": True}, ([], [END])),
        ({"tokenizer.ggml.pre": "llama-bpe"}, ([BOS], [])),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, ([], [])),
    ],
)
def test_gguf_metadata_says_what_stands_around_a_text(
    changes: dict[str, Any], around: tuple[list[int], list[int]]
) -> None:
    tokens = gguf_tokenizer(METADATA | changes).encode("hello", add_special_tokens=True)
    assert tokens == [*around[0], WORDS.index("hello"), *around[1]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre 'deepseek-llm'"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
    ],
)
def test_other_gguf_tokenizers_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
    with pytest.raises(CheckpointError) as raised:
        gguf_tokenizer(metadata)
    assert named in str(raised.value)


def test_opening_models_imports_no_jax() -> None:
    code = "import sys, spotjax.models.catalog; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
