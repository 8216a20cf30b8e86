"""Conversations as messages on the wire and as chat templates want them, with tools, calls of them and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest

ROLES = {
    pb.ChatMessage.ROLE_SYSTEM: "system",
    pb.ChatMessage.ROLE_USER: "user",
    pb.ChatMessage.ROLE_ASSISTANT: "assistant",
    pb.ChatMessage.ROLE_TOOL: "tool",
}
ROLES_BACK = {name: number for number, name in ROLES.items()}
MAX_TOOLS = 128


def conversation(chat: pb.ChatMessages) -> list[dict[str, Any]]:
    """The messages as chat templates want them.

    Raises:
      InvalidRequest: there are none, or one has no known role, or what its role does not have.
    """
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must have at least one message")
    return [_turn(f"chat.messages[{index}]", message) for index, message in enumerate(chat.messages)]


def _turn(path: str, message: pb.ChatMessage) -> dict[str, Any]:
    if message.role not in ROLES:
        accepted = ", ".join(pb.ChatMessage.Role.Name(role) for role in ROLES)
        raise InvalidRequest(f"{path}.role", f"must be one of {accepted}, got {message.role}")
    role = ROLES[message.role]
    if message.tool_calls and role != "assistant":
        raise InvalidRequest(f"{path}.tool_calls", f"only the assistant calls tools, the role is {role}")
    if bool(message.tool_call_id) != (role == "tool"):
        raise InvalidRequest(f"{path}.tool_call_id", f"messages of role tool have one and others have none, got {role}")
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(f"{path}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls)
        ]
    return turn


def _call(path: str, call: pb.ToolCall) -> dict[str, Any]:
    if not call.name:
        raise InvalidRequest(f"{path}.name", "must not be empty")
    arguments = _object(f"{path}.arguments", call.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def offered_tools(chat: pb.ChatMessages) -> list[dict[str, Any]]:
    """The tools as chat templates want them.

    Raises:
      InvalidRequest: one is not as OpenAI's interface writes a function, or there are too many.
    """
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidRequest("chat.tools", f"must be at most {MAX_TOOLS}, got {len(chat.tools)}")
    return [_tool(f"chat.tools[{index}]", text) for index, text in enumerate(chat.tools)]


def _tool(path: str, text: str) -> dict[str, Any]:
    tool = _object(path, text)
    if tool.get("type") != "function":
        raise InvalidRequest(f"{path}.type", f"must be function, got {tool.get('type')!r}")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest(f"{path}.function.name", "a function has a name")
    return tool


def _object(path: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(path, f"must be a JSON object: {error}") from error


def chat_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> pb.ChatMessages:
    """A conversation for the wire, for clients.

    Args:
      messages: each with ``role`` and ``content``, and what OpenAI's interface has beside them: ``tool_calls``,
        ``tool_call_id``, ``name``. Arguments of calls are JSON text or the objects themselves.
      tools: as OpenAI's interface has them.

    Raises:
      InvalidRequest: a message has another role, other keys or values of other types.
    """
    encoded = [msgspec.json.encode(tool).decode() for tool in tools]
    return pb.ChatMessages(messages=[_chat_message(message) for message in messages], tools=encoded)


def _chat_message(message: Mapping[str, Any]) -> pb.ChatMessage:
    path = "chat.messages"
    if unknown := set(message) - {"role", "content", "tool_calls", "tool_call_id", "name"}:
        raise InvalidRequest(path, f"a message has role and content, got {', '.join(sorted(unknown))}")
    if not {"role", "content"} <= set(message):
        raise InvalidRequest(path, f"a message has role and content, got {', '.join(message) or 'nothing'}")
    if message["role"] not in ROLES_BACK:
        raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES_BACK)}, got {message['role']!r}")
    try:
        return pb.ChatMessage(
            role=ROLES_BACK[message["role"]],
            content=message["content"] or "",
            tool_calls=[_tool_call(call) for call in message.get("tool_calls") or ()],
            tool_call_id=message.get("tool_call_id") or "",
            name=message.get("name") or "",
        )
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(path, f"{type(error).__name__}: {error}") from error


def _tool_call(call: Mapping[str, Any]) -> pb.ToolCall:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return pb.ToolCall(id=call["id"], name=function["name"], arguments=text)
