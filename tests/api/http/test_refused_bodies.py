"""What the server does not take it refuses by name, in OpenAI's schema, and does nothing."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from http_cases import Web, chat_body, error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotjax.api.http.bodies import ChatBody, CompletionBody
from spotjax.api.http.reading import decoded
from spotjax.api.http.translation import chat_requests, completion_requests
from spotjax.errors import InvalidRequest

USER = {"role": "user", "content": "Hi"}
BOTH = [
    ({"nope": 1}, "nope"),
    ({"stream_options": {"nope": 1}, "stream": True}, "stream_options.nope"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.5}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"stop_token_ids": [9999]}, "stop_token_ids"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"stream": "yes"}, "stream"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
]
COMPLETION = [
    *BOTH,
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "x" * 300}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
]
CHAT = [
    *BOTH,
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[...].content[...].type"),
    ({"messages": [{**USER, "mood": "good"}]}, "messages[...].mood"),
    ({"messages": [{**USER, "function_call": {}}]}, "messages[...].function_call"),
    ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "x"}}]}]},
        "messages[0].tool_calls[0].arguments",
    ),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"modalities": ["audio"]}, "modalities[...]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
]  # fmt: skip


async def refuse(web: Web, path: str, body: dict[str, Any], field: str) -> None:
    response = await web.client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    at = error["param"]
    assert at is not None and at.replace("[0]", "[...]") == field.replace("[0]", "[...]"), error
    assert error["message"].startswith(f"{at}: ") and error["type"] == "invalid_request_error"
    assert not web.service.requests


async def test_completions_refuse_by_name(open_web: Web) -> None:
    for body, field in COMPLETION:
        await refuse(open_web, "/v1/completions", {"prompt": "Hi", **body}, field)


async def test_chats_refuse_by_name(open_web: Web) -> None:
    for body, field in CHAT:
        await refuse(open_web, "/v1/chat/completions", chat_body(**body), field)


async def test_null_is_as_good_as_nothing(open_web: Web) -> None:
    nothing = dict.fromkeys(ChatBody.__struct_fields__)
    assert (await open_web.chat(**{k: v for k, v in nothing.items() if k != "messages"})).status_code == 200
    nothing = dict.fromkeys(CompletionBody.__struct_fields__)
    assert (await open_web.complete(**{k: v for k, v in nothing.items() if k != "prompt"})).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b"\0",
     b"1e999", b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "tools": ' + b"[" * 100_000],
)  # fmt: skip
async def test_what_is_not_json_of_an_object_is_refused(open_web: Web, content: bytes) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await open_web.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400 and error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_what_a_form_of_another_site_can_send_is_refused(open_web: Web, kind: str) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    response = await open_web.client.post("/v1/completions", content=body, headers={"content-type": kind})
    assert response.status_code == 415 and "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("told", [True, False])
async def test_a_body_that_is_too_large_is_refused(open_web: Web, told: bool) -> None:
    large = json.dumps({"prompt": "x" * (10 << 20)}).encode()

    async def pieces() -> Any:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    headers = {"content-type": "application/json"}
    response = await open_web.client.post("/v1/completions", content=large if told else pieces(), headers=headers)
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert error_of(response)["message"].endswith("the body must be at most 4194304 bytes")
    assert (await open_web.complete(max_tokens=1)).status_code == 200


async def test_a_body_that_does_not_end_is_not_read_for_ever(open_web: Web) -> None:
    sent = 0

    async def pieces() -> Any:
        nonlocal sent
        while True:
            sent += 1 << 18
            yield b"x" * (1 << 18)

    with pytest.raises(httpx.HTTPError):
        await open_web.client.post(
            "/v1/completions", content=pieces(), headers={"content-type": "application/json"}, timeout=30
        )
    assert sent < 1 << 27


async def test_other_methods_and_paths_are_refused(open_web: Web) -> None:
    assert (await open_web.client.get("/v1/completions")).status_code == 405
    assert (await open_web.client.post("/v1/embeddings", json={})).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "translate", "whole"),
    [
        (CompletionBody, completion_requests, {"prompt": "Hi"}),
        (ChatBody, chat_requests, {"messages": [USER], "tools": [{"type": "function"}]}),
    ],
)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_body_is_translated_or_refused_by_name(kind: Any, translate: Any, whole: Any, data: st.DataObject) -> None:
    names = st.sampled_from(kind.__struct_fields__) | st.text(max_size=5)
    body = whole | data.draw(st.dictionaries(names, JSON, max_size=3))
    try:
        requests = translate(decoded(json.dumps(body).encode(), kind))
    except InvalidRequest as error:
        assert error.field and str(error).startswith(f"{error.field}: ")
    else:
        assert requests
