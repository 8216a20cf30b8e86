"""OpenAI's dialect: the body of a request, and what each event of the answer says. Pure.

Only what figures need is read of an event; whatever else a server sends in it is its own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from spotjax.bench.exchange import MESSAGE, Exchange, PlannedRequest
from spotjax.errors import EndpointFailed

Dialect = Literal["completions", "chat"]
PATHS: Mapping[Dialect, str] = {"completions": "/completions", "chat": "/chat/completions"}
DONE = b"[DONE]"
GIVEN_UP = ("abort", "cancelled", "deadline", "error")
"""Reasons for which servers end an answer that is not complete."""
_NULL = msgspec.Raw(b"null")


class Usage(msgspec.Struct):
    """Token counts of a whole answer."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Delta(msgspec.Struct):
    """A piece of a chat's answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _NULL

    @property
    def text(self) -> str:
        """What a reader sees."""
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class Choice(msgspec.Struct):
    """A piece of one answer, of either dialect."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def only_says_who(self) -> bool:
        """A chat's first event may say no more than that the assistant speaks: no token was computed for it."""
        delta = self.delta
        if delta is None or not delta.role or delta.text or self.finish_reason:
            return False
        return bytes(delta.tool_calls) in (b"null", b"[]")


class Event(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = _NULL


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_EVENT = msgspec.json.Decoder(Event)


def body(dialect: Dialect, model: str, request: PlannedRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is posted; ``options`` come on top. Where tokens are drawn, each request has a seed of its own.

    Raises:
      EndpointFailed: a chat cannot be had from token ids.
    """
    fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if dialect == "completions":
        fields |= {"prompt": request.prompt, "max_tokens": request.output_tokens}
    elif isinstance(request.prompt, str):
        messages = [{"role": "user", "content": request.prompt}]
        fields |= {"messages": messages, "max_completion_tokens": request.output_tokens}
    else:
        raise EndpointFailed("prompt", "a chat is text, and the prompt is token ids")
    if options.get("temperature"):
        fields["seed"] = request.seed
    return fields | dict(options)


def take(data: bytes, exchange: Exchange, at: float) -> None:
    """Writes down what an event says that came at ``at`` seconds.

    Raises:
      EndpointFailed: it is no event of this dialect, or the server says that something went wrong.
    """
    try:
        event = _EVENT.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise EndpointFailed("garbage", f"an event that cannot be read: {problem}") from None
    if (said := bytes(event.error)) != b"null":
        raise EndpointFailed("error in stream", error_message(said))
    if event.usage is not None:
        exchange.prompt_tokens, exchange.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    if event.choices and not (choice := event.choices[0]).only_says_who:
        exchange.piece(at, choice.delta.text if choice.delta is not None else choice.text or "")
        exchange.finish = choice.finish_reason or exchange.finish


def check_end(exchange: Exchange, done: bool) -> None:
    """Whether an answer whose stream ended is complete; ``done`` if the stream said so.

    Raises:
      EndpointFailed: it is not.
    """
    if not exchange.times:
        raise EndpointFailed("no tokens", "the stream ended without a single piece of output")
    if exchange.finish in GIVEN_UP:
        raise EndpointFailed("ended early", f"the server gave as its reason {exchange.finish!r}")
    if not done and exchange.finish is None:
        raise EndpointFailed("broken stream", f"the stream ended after {len(exchange.times)} pieces without a reason")


def models(data: bytes) -> list[str]:
    """Names of what is served, from the answer to ``GET /v1/models``.

    Raises:
      EndpointFailed: it is not such an answer, or names none.
    """
    try:
        names = [model.id for model in msgspec.json.decode(data, type=_Models).data]
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise EndpointFailed(
            "garbage", f"the list of models cannot be read: {problem}; name one with --model"
        ) from None
    if not names:
        raise EndpointFailed("no model", "the server lists no models; name one with --model")
    return names


def error_message(data: bytes) -> str:
    """What a server says went wrong, from the body of its answer."""
    try:
        said = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return data[:MESSAGE].decode(errors="replace").strip()
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return str(said)[:MESSAGE]
