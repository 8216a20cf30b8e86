"""Conversations: messages, tools and calls of tools reach the chat template, or are refused by name."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from scripted_server import MODEL, Running

from spotjax.api.conversation import chat_messages, conversation, offered_tools
from spotjax.api.errors import FIELD_KEY
from spotjax.api.prompt import render
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.requests import generate_request
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.errors import InvalidRequest

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"days": 5}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 5}}}
CALLED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.", "name": "rules"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
]


def test_what_a_client_says_is_what_the_template_gets() -> None:
    message = pb.ChatMessages.FromString(chat_messages(CALLED, [TOOL]).SerializeToString())
    assert (conversation(message), offered_tools(message)) == (CALLED, [TOOL])
    assert render(message, MODEL.tokenizer) == (
        'tool weather\nsystem: Be brief.\nassistant:  weather({"city":"Köln","days":5})\ntool: rain\nassistant: '
    )


def test_arguments_as_text_are_the_same() -> None:
    text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 5}'}}
    assert conversation(chat_messages([{"role": "assistant", "content": None, "tool_calls": [text]}])) == [CALLED[1]]


ASSISTANT, TOOL_ROLE, USER = pb.ChatMessage.ROLE_ASSISTANT, pb.ChatMessage.ROLE_TOOL, pb.ChatMessage.ROLE_USER


@pytest.mark.parametrize(
    ("field", "chat"),
    [
        ("messages", pb.ChatMessages()),
        ("messages[0].role", pb.ChatMessages(messages=[pb.ChatMessage(content="x")])),
        ("messages[0].tool_calls", {"role": USER, "tool_calls": [pb.ToolCall(name="f", arguments="{}")]}),
        ("messages[0].tool_call_id", {"role": TOOL_ROLE, "content": "x"}),
        ("messages[0].tool_call_id", {"role": USER, "tool_call_id": "1"}),
        ("messages[0].tool_calls[0].name", {"role": ASSISTANT, "tool_calls": [pb.ToolCall(arguments="{}")]}),
        ("messages[0].tool_calls[0].arguments", {"role": ASSISTANT, "tool_calls": [pb.ToolCall(name="f")]}),
        (
            "messages[0].tool_calls[0].arguments",
            {"role": ASSISTANT, "tool_calls": [pb.ToolCall(name="f", arguments="[" * 100_000)]},
        ),
        ("tools[0]", ["[]"]),
        ("tools[0]", ["{"]),
        ("tools[1].type", ['{"type": "function", "function": {"name": "f"}}', '{"type": "custom"}']),
        ("tools[0].function.name", ['{"type": "function"}']),
        ("tools[0].function.name", ['{"type": "function", "function": {"name": ""}}']),
        ("tools", ['{"type": "function", "function": {"name": "f"}}'] * 129),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_not_a_conversation_is_refused_by_name(open_server: Running, field: str, chat: Any) -> None:
    if isinstance(chat, dict):
        chat = pb.ChatMessages(messages=[pb.ChatMessage(**chat)])
    elif isinstance(chat, list):
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role=USER, content="x")], tools=chat)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in open_server.generation.Generate(pb.GenerateRequest(chat=chat)):
            pass
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(raised.value.trailing_metadata())[FIELD_KEY] == f"chat.{field}"


async def test_clients_send_tools_with_a_conversation_only(open_server: Running) -> None:
    async with AsyncSpotjaxClient(open_server.address) as client:
        told = [d.usage async for d in client.generate(CALLED, tools=[TOOL], max_tokens=1)]
        assert told[-1] is not None and told[-1].prompt_tokens == len(
            render(chat_messages(CALLED, [TOOL]), MODEL.tokenizer).encode()
        )
    for prompt in ("text", [1, 2], []):
        with pytest.raises(InvalidRequest, match="only a conversation"):
            generate_request(prompt, {}, tools=[TOOL])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"}, {"content": "x"}, {"role": "robot", "content": "x"}, {"role": "user", "content": 5},
        {"role": "user", "content": "x", "mood": "good"}, {"role": "assistant", "content": "", "tool_calls": [{}]},
    ],
)  # fmt: skip
def test_clients_refuse_what_is_no_message(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"chat\.messages"):
        chat_messages([message])
