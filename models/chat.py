"""Renders chat messages with a model's own Jinja template, in a sandbox, as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spotjax.errors import CheckpointError, InvalidRequest


class ChatTemplate:
    """A model's chat template.

    Args:
      source: the template, Jinja as Hugging Face writes it.
      special_tokens: text of ``bos_token``, ``eos_token`` and so on, which templates refer to.

    Attributes:
      source, special_tokens: as given.
      has_tools: whether it has a place for tools.

    Raises:
      CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.has_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template is not valid in line {error.lineno}: {error.message}") from error
        self.source, self.special_tokens = source, dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt text of a chat, up to where the assistant answers.

        Args:
          messages: each with ``role`` and ``content``, and ``tool_calls`` and so on where it has them.
          tools: that the model is told of.

        Raises:
          InvalidRequest: the template refuses the messages, for example because of the order of their roles, or has no
            place for tools; names ``messages`` or ``tools``.
        """
        if tools and not self.has_tools:
            raise InvalidRequest("tools", "the model's chat template has no place for tools")
        if not self.has_tools and any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            raise InvalidRequest("messages", "the model's chat template has no place for calls of tools")
        try:
            return self._template.render(
                **self.special_tokens,
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from error


class _GenerationBlocks(Extension):
    """Passes through ``{% generation %}``, with which templates mark the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
