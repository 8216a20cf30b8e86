"""From the input of a request to token ids. Owns what a prompt may be, not how it is tokenized."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest

ROLES = {
    pb.ChatMessage.ROLE_SYSTEM: "system",
    pb.ChatMessage.ROLE_USER: "user",
    pb.ChatMessage.ROLE_ASSISTANT: "assistant",
}


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

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text, special tokens included, that asks the model for the next message of a conversation.

        Raises:
          InvalidRequest: the model has no chat template, or it refuses the conversation.
        """
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
            text = render(conversation(request.chat), tokenizer)
            tokens = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
            return at_least_one("chat.messages", tokens)
        case "token_ids":
            check_tokens("token_ids.ids", request.token_ids.ids, tokenizer.vocab_size)
            return at_least_one("token_ids.ids", request.token_ids.ids)
    raise InvalidRequest("input", "one of text, chat and token_ids must be set")


def render(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """Text of a conversation; what the template refuses is refused under the API's name for it."""
    try:
        return tokenizer.render_chat(messages)
    except InvalidRequest as error:
        raise InvalidRequest("chat.messages", str(error).removeprefix(f"{error.field}: ")) from error


def conversation(chat: pb.ChatMessages) -> list[dict[str, str]]:
    """The messages as chat templates want them.

    Raises:
      InvalidRequest: there are none, or one has no known role.
    """
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must have at least one message")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            accepted = ", ".join(pb.ChatMessage.Role.Name(role) for role in ROLES)
            raise InvalidRequest(f"chat.messages[{index}].role", f"must be one of {accepted}, got {message.role}")
    return [{"role": ROLES[message.role], "content": message.content} for message in chat.messages]


def check_tokens(field: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest unless all tokens are below ``vocab_size``."""
    if tokens and (highest := max(tokens)) >= vocab_size:
        raise InvalidRequest(field, f"token ids must be in [0, {vocab_size - 1}], got {highest}")


def at_least_one(field: str, tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens; raises InvalidRequest if there are none."""
    if not tokens:
        raise InvalidRequest(field, "must come to at least one token")
    return tuple(tokens)
