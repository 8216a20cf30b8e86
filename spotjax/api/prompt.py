"""From the input of a request to token ids. Owns what a prompt may be, not how it is tokenized."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from spotjax.api.conversation import conversation, offered_tools
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest


class Tokenizer(Protocol):
    """What the API needs of a tokenizer; ``spotjax.models.tokenizer`` has the real ones."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end generation."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; with the model's start token in front if ``add_special_tokens``."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text, special tokens included, that asks the model for the next message of a conversation.

        Args:
          messages: see ``conversation.conversation``.
          tools: that the model is told of.

        Raises:
          InvalidRequest: the model has no chat template, or it refuses the conversation, or has no place for tools;
            names ``messages`` or ``tools``.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        ...


async def prompt_tokens(request: pb.GenerateRequest, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of the input; tokenizes on a thread, so that long texts hold up nobody's stream.

    Raises:
      InvalidRequest: the input is missing, empty, or has tokens or roles that do not exist.
    """
    match request.WhichOneof("input"):
        case "text":
            if not request.text:
                raise InvalidRequest("text", "must not be empty")
            tokens = await asyncio.to_thread(tokenizer.encode, request.text, add_special_tokens=True)
            return at_least_one("text", tokens)
        case "chat":
            text = render(request.chat, tokenizer)
            tokens = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
            return at_least_one("chat.messages", tokens)
        case "token_ids":
            check_tokens("token_ids.ids", request.token_ids.ids, tokenizer.vocab_size)
            return at_least_one("token_ids.ids", request.token_ids.ids)
    raise InvalidRequest("input", "one of text, chat and token_ids must be set")


def render(chat: pb.ChatMessages, tokenizer: Tokenizer) -> str:
    """Text of a conversation; what the template refuses is refused under the API's name for it."""
    messages, tools = conversation(chat), offered_tools(chat)
    try:
        return tokenizer.render_chat(messages, tools)
    except InvalidRequest as error:
        raise InvalidRequest(f"chat.{error.field}", str(error).removeprefix(f"{error.field}: ")) from error


def check_tokens(field: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest unless all tokens are below ``vocab_size``."""
    if tokens and (highest := max(tokens)) >= vocab_size:
        raise InvalidRequest(field, f"token ids must be in [0, {vocab_size - 1}], got {highest}")


def at_least_one(field: str, tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens; raises InvalidRequest if there are none."""
    if not tokens:
        raise InvalidRequest(field, "must come to at least one token")
    return tuple(tokens)
