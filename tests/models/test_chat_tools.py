"""Tools in chats: shown by templates that have a place for them, refused by name by others."""

from __future__ import annotations

from typing import Any

import pytest

from spotjax.errors import InvalidRequest
from spotjax.models.chat import ChatTemplate

QWEN = (  # after Qwen2.5-Instruct's
    "{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- message.role + ': ' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}</tool_call>' }}{%- endfor %}{{- '\\n' }}{%- endfor %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"days": {"maximum": 5}}}},
}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
        ],
    },
    {"role": "tool", "content": "yes", "tool_call_id": "1"},
]


def test_a_template_shows_tools_calls_and_results() -> None:
    assert ChatTemplate(QWEN, {}).render(CALLED, [TOOL]) == (
        '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", '
        '"properties": {"days": {"maximum": 5}}}}}\n</tools>\n'
        'user: Rain?\nassistant: <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>\ntool: yes\n'
    )


def test_without_tools_the_template_sees_none() -> None:
    template = ChatTemplate("{{ 'none' if tools is none else tools | length }}", {})
    assert (template.render(CALLED[:1]), template.render(CALLED[:1], [TOOL, TOOL])) == ("none", "2")


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [(CALLED[:1], [TOOL], "tools"), (CALLED[:2], [], "messages"), (CALLED, [], "messages")],
)
def test_a_template_without_a_place_for_tools_refuses_them_by_name(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], field: str
) -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", {})
    with pytest.raises(InvalidRequest, match="no place for") as raised:
        template.render(messages, tools)
    assert raised.value.field == field
