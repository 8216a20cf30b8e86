"""OpenAI's interface, ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``: what a call goes through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from spotjax.api.access.current import current_caller
from spotjax.api.backend import Backend
from spotjax.api.http.answers import Shapes, answer_events, whole_answer
from spotjax.api.http.bodies import Body, ChatBody, CompletionBody
from spotjax.api.http.chat import ChatShapes
from spotjax.api.http.completions import CompletionShapes
from spotjax.api.http.errors import JSON
from spotjax.api.http.event_stream import EventStream, while_connected
from spotjax.api.http.generating import Generating, Sender, require_number
from spotjax.api.http.progress import FIELD, Progress
from spotjax.api.http.reading import read
from spotjax.api.http.translation import (
    chat_names,
    chat_requests,
    completion_names,
    completion_requests,
    renamed,
)
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.validation import ServedModel, accepted_request
from spotjax.errors import InvalidRequest, UnknownModel


def routes(backend: Backend) -> list[Route]:
    """All of it."""
    created = int(time.time())

    def described(model: ServedModel) -> dict[str, object]:
        limit = {"max_model_len": model.max_model_len}
        return {"id": model.name, "object": "model", "created": created, "owned_by": "spotjax", **limit}

    async def models(request: Request) -> Response:
        _, model = backend.get()
        shown = [described(model)] if current_caller().may_use(model.name) else []
        return Response(msgspec.json.encode({"object": "list", "data": shown}), media_type=JSON)

    async def model(request: Request) -> Response:
        (_, served), name = backend.get(), request.path_params["name"]
        if name != served.name or not current_caller().may_use(name):
            raise UnknownModel(name, served.name)
        return Response(msgspec.json.encode(described(served)), media_type=JSON)

    async def completions(request: Request) -> Response:
        body = await read(request, CompletionBody)
        try:
            call = await begun(backend, request, body, completion_requests(body), to_the_end=False)
        except InvalidRequest as error:
            raise renamed(error, completion_names(body)) from None
        seen = {}
        if body.logprobs is not None:
            seen = {n: await call.seen(n) for n, tokens in enumerate(call.progress.tokens) if tokens > 0}
        shapes = CompletionShapes(call.progress.base, backend.get()[1], body, seen)
        return await answer(request, body, call, shapes)

    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody)
        try:
            call = await begun(backend, request, body, chat_requests(body), to_the_end=True)
        except InvalidRequest as error:
            raise renamed(error, chat_names(body)) from None
        return await answer(request, body, call, ChatShapes(call.progress.base, backend.get()[1], body))

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


async def begun(
    backend: Backend, request: Request, body: Body, messages: Sequence[pb.GenerateRequest], *, to_the_end: bool
) -> Generating:
    """The call's requests, on record. If the client leaves meanwhile, they are ended.

    Args:
      to_the_end: without a limit, output may take all that the prompt leaves.

    Raises:
      InvalidRequest: a field is out of range.
      ClientGone: it left.
      SpotjaxError: see ``Generating.accept``.
    """
    service, model = backend.for_caller()
    sender = Sender.of(request, streams=body.stream or False)
    base = sender.base()
    accepted = []
    for number, message in enumerate(messages):
        message.request_id = base if len(messages) == 1 else f"{base}-{number}"
        message.resumable |= bool(sender.key)
        accepted.append(await accepted_request(message, model, to_the_end=to_the_end))
    if sender.key:
        require_number(service, base, len(messages))
    progress = Progress.nothing(base, accepted[0].n * len(accepted))
    if sender.event:
        progress = Progress.of(sender.event, len(progress.tokens))
        if sender.key and progress.base != base:
            raise InvalidRequest(FIELD, "is of another request than the one with this Idempotency-Key")
        accepted = [replace(r, request_id=r.request_id.replace(base, progress.base, 1)) for r in accepted]
    call = Generating(service, accepted, progress, taken_up=bool(sender.event), seeded=body.seed is not None)
    await while_connected(request.receive, call.accept())
    return call


async def answer(request: Request, body: Body, call: Generating, shapes: Shapes) -> Response:
    """The response: a stream, or the whole once it is there."""
    n = body.n or 1
    headers = {"x-request-id": call.progress.base}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(answer_events(call, shapes, n, include_usage=usage), headers, call.leave)
    try:
        whole = await while_connected(request.receive, whole_answer(call, shapes, n))
        return Response(whole, 200, headers, JSON)
    finally:
        call.leave()
