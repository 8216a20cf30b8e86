"""Fills templates. What they insert is quoted unless they say not to, so that no value is forgotten."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import jinja2

Quote = Callable[[str], str]


class Verbatim(str):
    """Text that is inserted as it is."""

    __slots__ = ()


def render(template: str, quote: Quote, values: dict[str, Any]) -> str:
    """Fills a template of this package; a value that it misses is an error.

    Args:
      template: its file name.
      quote: makes a value safe in the language of the template.
      values: what it inserts.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spotjax.bootstrap"),
        undefined=jinja2.StrictUndefined,
        comment_start_string="{##",  # in Bash, {# has a meaning
        comment_end_string="##}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Verbatim) else quote(str(value)),
        autoescape=False,
    )
    environment.filters["verbatim"] = Verbatim
    return environment.get_template(template).render(values)


def shell(value: str) -> str:
    """One word of a POSIX shell."""
    return shlex.quote(value)


def toml(value: Any) -> str:
    """One value of TOML: a string, a number or a truth value, as JSON writes it."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
