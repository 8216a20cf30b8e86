"""The documents, and what the tests take out of them: code blocks, commands, inline code, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    """Code of the blocks in that language, an empty one for none."""
    return [match[2] for match in _FENCE.finditer(text) if match[1] == language]


def inline_code(text: str) -> list[str]:
    """What stands in backticks outside of blocks."""
    return _INLINE.findall(_FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures outside of blocks."""
    return _LINK.findall(_INLINE.sub("", _FENCE.sub("", text)))


def commands(text: str, *programs: str) -> Iterator[list[str]]:
    """Words of the commands in blocks and inline code that run one of the programs, the program first.

    Comments, leading assignments of variables, and what comes before and after pipes and ``&&`` are taken apart.
    """
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    for line in [*lines, *inline_code(text)]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("|", "&&", ";"):
                if command and command[0] in programs:
                    yield command
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):
                command.append(word)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as they are made on code hosting sites."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
