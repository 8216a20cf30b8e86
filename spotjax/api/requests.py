"""Builds request messages from Python values, for clients. Whether a server takes them is for the server to say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage

from spotjax.api.conversation import chat_messages
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest

Message = Mapping[str, Any]
"""``role`` (system, user, assistant or tool) and ``content``; more of it in ``conversation.chat_messages``."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""


Built = TypeVar("Built", bound=ProtoMessage)


class Structure(TypedDict, total=False):
    """What output must match, one of these; see the message ``Structure``."""

    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    grammar: str


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
    structure: Structure


def generate_request(
    prompt: Prompt,
    sampling: Sampling,
    request_id: str | None = None,
    model: str | None = None,
    n: int = 1,
    resumable: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> pb.GenerateRequest:
    """The message.

    Args:
      tools: that the model is told of in a conversation, as OpenAI's interface has them.

    Raises:
      InvalidRequest: a value cannot even be put into the message, such as a negative ``top_k``.
    """
    fields: dict[str, object] = {"request_id": request_id, "model": model, "n": n, "resumable": resumable}
    if tools and (isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping)):
        raise InvalidRequest("tools", "only a conversation has tools")
    chosen: dict[str, object] = dict(sampling)
    if (structure := sampling.get("structure")) is not None:
        chosen["structure"] = structure_message(structure)
    fields["sampling"] = built(pb.Sampling, "sampling.", **chosen)
    if isinstance(prompt, str):
        fields["text"] = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        fields["chat"] = chat_messages(cast(Sequence[Message], prompt), tools)
    else:
        fields["token_ids"] = built(pb.TokenIds, "token_ids.", ids=prompt)
    return built(pb.GenerateRequest, **fields)


def structure_message(structure: Structure) -> pb.Structure:
    """The message; a schema may be given as the object that it is.

    Raises:
      InvalidRequest: it has not exactly one field, or one that does not exist.
    """
    given: dict[str, object] = dict(structure)
    if len(given) != 1:
        kinds = ", ".join(Structure.__annotations__)
        raise InvalidRequest("sampling.structure", f"exactly one of {kinds}, got {', '.join(given) or 'none'}")
    if isinstance(schema := given.get("json_schema"), Mapping):
        try:
            given["json_schema"] = json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise InvalidRequest("sampling.structure.json_schema", str(error)) from error
    return built(pb.Structure, "sampling.structure.", **given)


def built(kind: type[Built], path: str = "", /, **fields: object) -> Built:
    """A message with these fields; one that is None stays unset.

    Raises:
      InvalidRequest: a field does not exist, or cannot hold its value; names it, below ``path``.
    """
    message = kind()
    for name, value in fields.items():
        if name not in message.DESCRIPTOR.fields_by_name:
            raise InvalidRequest(f"{path}{name}", "no such field")
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}{name}", str(error)) from error
    return message
