"""Text to token ids and back, and chats to text. Imports no jax; streaming of partial text is the engine's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from spotjax.errors import CheckpointError, InvalidRequest
from spotjax.models.chat import ChatTemplate
from spotjax.models.token_bytes import TokenBytes


class Tokenizer:
    """A model's tokenizer.

    Args:
      tokenizer: of the ``tokenizers`` library.
      end_tokens: tokens that end a text.
      chat: how chats become text; None when the model has no chat template.

    Attributes:
      end_tokens: tokens that end a text.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, end_tokens: frozenset[int], chat: ChatTemplate | None = None
    ) -> None:
        # Files may carry the truncation of their training; a prompt must never be cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._chat = chat
        self.end_tokens = end_tokens

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory.

        End tokens are all that ``generation_config.json``, ``config.json`` and ``tokenizer_config.json`` name.

        Raises:
          CheckpointError: ``tokenizer.json`` is missing, or a file is damaged.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; convert the model's tokenizer with transformers first")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        settings = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(settings)
        ends: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            ends |= _token_ids(_read_json(directory / name).get("eos_token_id"), directory / name)
        if "eos_token" in special_tokens:
            token = tokenizer.token_to_id(special_tokens["eos_token"])
            if token is None:
                raise CheckpointError(f"{path} has no token {special_tokens['eos_token']!r}, the eos_token")
            ends.add(token)
        source = _chat_template(directory, settings)
        return cls(tokenizer, frozenset(ends), ChatTemplate(source, special_tokens) if source is not None else None)

    def files(self) -> dict[str, bytes]:
        """Name and contents of the files from which ``from_directory`` makes this tokenizer again."""
        files = {
            "tokenizer.json": self._tokenizer.to_str().encode(),
            "generation_config.json": msgspec.json.encode({"eos_token_id": sorted(self.end_tokens)}),
        }
        if self._chat is not None:
            files["tokenizer_config.json"] = msgspec.json.encode(self._chat.special_tokens)
            files["chat_template.jinja"] = self._chat.source.encode()
        return files

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows than that."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens``, begun and ended as the model was trained (e.g. BOS)."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens`` without special tokens; bytes that are not whole characters become U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, special ones too; none where there is no such token."""
        return self._bytes[token]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Text of a chat up to where the assistant answers; to be encoded without special tokens being added.

        Raises:
          InvalidRequest: the model has no chat template, or its template refuses the messages or has no place for
            tools; names ``messages`` or ``tools``.
        """
        if self._chat is None:
            raise InvalidRequest("messages", "the model has no chat template; send a text prompt")
        return self._chat.render(messages, tools)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _token_ids(value: Any, path: Path) -> set[int]:
    """An ``eos_token_id``: an id, a list of them, or null."""
    try:
        ids = msgspec.convert(value, int | list[int] | None)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: eos_token_id: {error}") from error
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Text of ``bos_token`` and its like, which are written as a string or as an object with ``content``."""
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template: its own file first, then the one of ``tokenizer_config.json``, of several the one named default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
            return str(named["default"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: none of the chat templates is named 'default'") from error
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template must be text or a list of named texts")
    return template
