"""Builds a ``GenerateRequest`` from Python values, for clients. Whether a server takes it is for the server to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

from spotjax.api.prompt import ROLES
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest

Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""


class Sampling(TypedDict, total=False):
    """How tokens are chosen; ranges and defaults are those of the message ``Sampling``."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool


def generate_request(
    prompt: Prompt,
    sampling: Sampling,
    request_id: str | None = None,
    model: str | None = None,
    n: int = 1,
    resumable: bool = True,
) -> pb.GenerateRequest:
    """The message.

    Raises:
      InvalidRequest: a value cannot even be put into the message, such as a negative ``top_k``.
    """
    for name, value in sampling.items():
        if name not in pb.Sampling.DESCRIPTOR.fields_by_name:
            raise InvalidRequest(f"sampling.{name}", "no such field")
        try:
            pb.Sampling(**{name: value})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"sampling.{name}", str(error)) from error
    try:
        request = pb.GenerateRequest(
            request_id=request_id, model=model, sampling=pb.Sampling(**sampling), n=n, resumable=resumable
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest("n", str(error)) from error
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.messages.extend(map(chat_message, cast(Sequence[Message], prompt)))
    else:
        try:
            request.token_ids.ids.extend(cast(Sequence[int], prompt))
        except (TypeError, ValueError) as error:
            raise InvalidRequest("token_ids.ids", str(error)) from error
        request.token_ids.SetInParent()
    return request


def chat_message(message: Message) -> pb.ChatMessage:
    """One message of a conversation.

    Raises:
      InvalidRequest: it has another role, or other keys than ``role`` and ``content``.
    """
    roles = {name: number for number, name in ROLES.items()}
    if set(message) != {"role", "content"}:
        raise InvalidRequest("chat.messages", f"a message has role and content, got {', '.join(message) or 'nothing'}")
    if message["role"] not in roles:
        raise InvalidRequest("chat.messages.role", f"must be one of {', '.join(roles)}, got {message['role']!r}")
    return pb.ChatMessage(role=roles[message["role"]], content=message["content"])
