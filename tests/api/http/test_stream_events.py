"""Streams event by event: their shapes, their ids, and clients that come back by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from http_cases import RENDERED, Event, Web, chat_body, error_of, events_of, expected
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import MODEL, until

from spotjax.api.http.progress import Progress
from spotjax.api.requests import generate_request
from spotjax.api.validation import accepted_request
from spotjax.engine.generation import Delta
from spotjax.errors import InvalidRequest
from spotjax.testing.scripted_service import ScriptedService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = {"idempotency-key": "my key"}


async def stream(
    web: Web, path: str, body: dict[str, Any], headers: dict[str, str] | None = None, most: int | None = None,
    let: int = 1,
) -> list[Event]:  # fmt: skip
    """Events of a stream; the first ``most`` of them, ``let`` tokens for each: then the client goes away."""
    seen: list[Event] = []
    async with web.client.stream("POST", path, json={**body, "stream": True}, headers=headers or {}) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        if most is None:
            return [event async for event in events_of(response)]
        events = events_of(response)
        while len(seen) < most:
            web.steps.let(let)
            seen.append(await anext(events))
    return seen


async def test_a_chat_s_chunks_have_openai_s_shape(web: Web) -> None:
    web.steps.let_all()
    opening, text, end, usage, done = await stream(
        web, CHAT, chat_body(max_tokens=3, seed=7, stream_options={"include_usage": True})
    )
    head = {key: opening.data[key] for key in ("id", "created", "model")}
    shape = {**head, "object": "chat.completion.chunk", "system_fingerprint": None, "usage": None}
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    assert opening.data == {**shape, "choices": [{**choice, "delta": {"role": "assistant", "content": ""}}]}
    assert text.data == {**shape, "choices": [{**choice, "delta": {"content": expected(RENDERED, 3)}}]}
    assert end.data == {**shape, "choices": [{**choice, "delta": {}, "finish_reason": "length"}]}
    counted = {"prompt_tokens": len(RENDERED), "completion_tokens": 3, "total_tokens": len(RENDERED) + 3}
    assert usage.data == {**shape, "choices": [], "usage": counted}
    base = head["id"].removeprefix("chatcmpl-")
    assert [e.id for e in (opening, text, end, usage, done)] == [
        f"{base}:{at}" for at in ("0", "3", "3f", "3fu", "3fu")
    ]


async def test_without_being_asked_for_there_is_no_usage(web: Web) -> None:
    web.steps.let_all()
    (only, done) = await stream(web, COMPLETIONS, {"prompt": "x", "max_tokens": 3, "seed": 7})
    assert done.data == "[DONE]"
    assert set(only.data) == {"id", "object", "created", "model", "choices", "system_fingerprint"}
    text = expected(b"x", 3, start=True)
    assert only.data["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]


def text_of(events: list[Event], choices: int = 1) -> list[str]:
    texts = [""] * choices
    for event in events:
        if event.data != "[DONE]":
            for choice in event.data["choices"]:
                texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return texts


@pytest.mark.parametrize("how", ["key", "event", "both"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_client_that_comes_back_gets_exactly_the_rest(web: Web, path: str, how: str) -> None:
    body = {"max_tokens": 9, "n": 2, "stream_options": {"include_usage": True}}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": ["a", "b"], "logprobs": 0}
    body |= {"resumable": True} if how == "event" else {}
    headers = {} if how == "event" else KEY
    choices = 2 if path == CHAT else 4
    seen = await stream(web, path, body, headers, most=7, let=1 if path == CHAT else 2)
    web.steps.let_all()
    if how == "key":
        whole = await stream(web, path, body, headers)
        both = zip(text_of(whole, choices), text_of(seen, choices), strict=True)
        assert all(full.startswith(part) and part for full, part in both)
        seen = []
    else:
        whole = await stream(web, path, body, {**headers, "last-event-id": seen[-1].id})
    texts = text_of([*seen, *whole], choices)
    assert [len(text) for text in texts] == [9] * choices
    ends = [c["finish_reason"] for e in [*seen, *whole] if e.data != "[DONE]" for c in e.data["choices"]]
    assert ends.count("length") == choices
    assert whole[-2].data["usage"]["completion_tokens"] == 9 * choices
    undisturbed = [script[1] for request in web.service.requests.values() for script in request.script]
    assert texts == undisturbed
    assert len({event.data["id"] for event in [*seen, *whole] if event.data != "[DONE]"}) == 1
    if path == COMPLETIONS and how != "key":
        told = [
            at for e in [*seen, *whole] if e.data != "[DONE]" for c in e.data["choices"]
            if c["index"] == 0 and c["logprobs"] for at in c["logprobs"]["text_offset"]
        ]  # fmt: skip
        assert told == list(range(9))


@given(st.data())
def test_an_event_id_says_all_that_was_sent(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(-1, 10**8), min_size=1, max_size=5))
    finished = {n for n, count in enumerate(tokens) if count >= 0 and data.draw(st.booleans())}
    progress = Progress("base", tokens, finished, data.draw(st.booleans()))
    assert Progress.of(progress.event_id, len(tokens)) == progress


@pytest.mark.parametrize("event_id", ["", "x", "a:", "a:1x", "a:1.", "a b:1", "a:1\n", f"{'a' * 61}:1", "a:1.2"])
def test_other_ids_are_refused(event_id: str) -> None:
    with pytest.raises(InvalidRequest, match="Last-Event-ID"):
        Progress.of(event_id, 1)


async def test_every_event_can_be_the_last_one_that_a_client_has(web: Web) -> None:
    body = chat_body(max_tokens=6, n=2, logprobs=True, stream_options={"include_usage": True})
    first = await stream(web, CHAT, body, KEY, most=12)
    web.steps.let_all()
    rest = await stream(web, CHAT, body, {**KEY, "last-event-id": first[-1].id})
    every = [*first, *rest]
    for at, event in enumerate(every[:-1]):
        again = await stream(web, CHAT, body, {**KEY, "last-event-id": event.id})
        assert text_of([*every[: at + 1], *again], 2) == text_of(every, 2)
        told = [c["finish_reason"] for e in [*every[: at + 1], *again] if e.data != "[DONE]" for c in e.data["choices"]]
        roles = [
            c["index"] for e in [*every[: at + 1], *again] if e.data != "[DONE]" for c in e.data["choices"]
            if c["delta"].get("role")
        ]  # fmt: skip
        usages = [e for e in [*every[: at + 1], *again] if e.data != "[DONE]" and e.data["usage"]]
        assert told.count("length") == 2 and sorted(roles) == [0, 1] and len(usages) == 1


async def test_an_answer_is_asked_for_again_whole_by_its_key(web: Web) -> None:
    web.steps.let_all()
    first = await web.client.post(CHAT, json=chat_body(max_tokens=9), headers=KEY)
    again = await web.client.post(CHAT, json=chat_body(max_tokens=9, user="me"), headers=KEY)
    assert first.json()["choices"] == again.json()["choices"] and first.json()["id"] == again.json()["id"]
    assert len(web.service.requests) == 1 and first.headers["x-request-id"] == again.headers["x-request-id"]


async def test_a_key_or_an_event_with_another_body_is_refused(web: Web) -> None:
    web.steps.let_all()
    events = await stream(web, CHAT, chat_body(max_tokens=9, seed=1), KEY)
    for other in (
        {"max_tokens": 8, "seed": 1},
        {"max_tokens": 9, "seed": 2},
        {"max_tokens": 9, "seed": 1, "stop": "x"},
    ):
        refused = await web.client.post(CHAT, json=chat_body(**other), headers=KEY)
        assert (refused.status_code, error_of(refused)["param"]) == (422, "Idempotency-Key")
        refused = await web.client.post(
            CHAT, json=chat_body(stream=True, **other), headers={"last-event-id": events[0].id}
        )
        assert (refused.status_code, error_of(refused)["param"]) == (422, "Last-Event-ID")
    another = await web.client.post(CHAT, json=chat_body(max_tokens=9, seed=1), headers={"idempotency-key": "two"})
    assert another.status_code == 200 and len(web.service.requests) == 2


async def test_a_key_with_another_number_of_prompts_is_refused(open_web: Web) -> None:
    async def asked(prompt: Any, key: str) -> int:
        body = {"prompt": prompt, "max_tokens": 3}
        return (await open_web.client.post(COMPLETIONS, json=body, headers={"idempotency-key": key})).status_code

    for prompts, others in (["a"], [["a", "b"]]), (["a", "b", "c"], ["a", ["a", "b"]]):
        key = str(len(prompts))
        assert await asked(prompts, key) == await asked(prompts, key) == 200
        assert [await asked(other, key) for other in others] == [422] * len(others)
    assert len(open_web.service.requests) == 4


async def test_a_server_that_stops_while_it_looks_at_what_a_client_has_says_so(web: Web) -> None:
    async def ends_at_once(request_id: str, offsets: Sequence[int] = ()) -> AsyncGenerator[Delta, None]:
        for delta in ():
            yield delta

    body = {"prompt": "a", "max_tokens": 9, "logprobs": 0, "stream": True}
    seen = await stream(web, COMPLETIONS, body, KEY, most=3)
    web.service.stream = ends_at_once  # type: ignore[method-assign]
    stopped = await web.client.post(COMPLETIONS, json=body, headers={**KEY, "last-event-id": seen[-1].id})
    assert (stopped.status_code, error_of(stopped)["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("headers", "stream", "status", "param"),
    [
        ({"last-event-id": "nonsense"}, True, 400, "Last-Event-ID"),
        ({"last-event-id": "unknown:5"}, True, 404, None),
        ({"last-event-id": "known:5"}, True, 400, "Last-Event-ID[0]"),
        ({"last-event-id": "unknown:5.6"}, True, 400, "Last-Event-ID"),
        ({"last-event-id": "unknown:5"}, False, 400, "Last-Event-ID"),
        ({"last-event-id": "unknown:5", **KEY}, True, 400, "Last-Event-ID"),
        ({"idempotency-key": "x" * 256}, False, 400, "Idempotency-Key"),
        ({"idempotency-key": "a\tb"}, False, 400, "Idempotency-Key"),
    ],
)
async def test_what_cannot_be_taken_up_is_refused(
    open_web: Web, headers: dict[str, str], stream: bool, status: int, param: str | None
) -> None:
    known = generate_request([*RENDERED], {"max_tokens": 3}, "known")
    await open_web.service.submit(await accepted_request(known, MODEL))
    body = chat_body(max_tokens=3, stream=stream)
    refused = await open_web.client.post(CHAT, json=body, headers=headers)
    assert (refused.status_code, error_of(refused)["param"]) == (status, param)
    assert len(open_web.service.requests) == 1


async def test_a_request_with_a_key_goes_on_without_its_client_and_others_end(web: Web) -> None:
    await stream(web, CHAT, chat_body(max_tokens=9), KEY, most=2)
    await stream(web, CHAT, chat_body(max_tokens=9), most=2, let=3)
    kept, ended = web.service.requests.values()
    await until(lambda: ended.ended)
    assert not kept.ended and kept.request.resumable
    gone = await web.client.post(
        CHAT, json=chat_body(max_tokens=9, stream=True), headers={"last-event-id": f"{ended.request.request_id}:1"}
    )
    assert '"code":"request_cancelled"' in gone.text and "[DONE]" not in gone.text


async def test_a_server_that_took_the_place_of_a_dead_one_goes_on(web: Web) -> None:
    body = chat_body(max_tokens=9)
    seen = await stream(web, CHAT, body, KEY, most=4)
    await web.service.stop()
    web.service = ScriptedService(log=web.service.requests.values())
    web.backend.attach(web.service, MODEL)
    rest = await stream(web, CHAT, body, {**KEY, "last-event-id": seen[-1].id})
    (request,) = web.service.requests.values()
    assert text_of([*seen, *rest]) == [request.script[0][1]] and len(request.script[0][1]) == 9


async def test_a_stream_whose_service_stops_ends_with_an_error_and_not_with_done(web: Web) -> None:
    async with web.client.stream("POST", CHAT, json=chat_body(stream=True)) as response:
        events = events_of(response)
        await anext(events)
        await web.service.stop()
        (error,) = [event async for event in events]
    assert error.data["error"]["type"] == "service_unavailable_error"


async def test_of_several_prompts_none_runs_on_when_one_is_refused(web: Web) -> None:
    submit, taken = web.service.submit, 0

    def submit_two(request: Any) -> Any:
        nonlocal taken
        taken += 1
        web.service.overloaded = taken > 2
        return submit(request)

    web.service.submit = submit_two  # type: ignore[method-assign]
    refused = await web.complete(prompt=["a", "b", "c"])
    assert refused.status_code == 429
    assert len(web.service.requests) == 2
    await until(lambda: all(request.ended for request in web.service.requests.values()))


async def test_a_client_that_leaves_before_its_request_is_on_record_ends_it(web: Web) -> None:
    recording = asyncio.Event()
    web.service._record = recording.wait
    asking = asyncio.create_task(web.complete(max_tokens=9))
    await until(lambda: web.service.requests)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    (request,) = web.service.requests.values()
    recording.set()
    await until(lambda: request.ended)
