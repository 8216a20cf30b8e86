"""What keeps a sequence's output to a structure: the contract between the engine and whatever knows grammars.

A structure is part of how tokens are chosen. What it allows next is a function of it and of the output so far, nothing
else: so a sequence that goes on elsewhere goes on within its structure. Grammars are ``spotjax.structured``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np

from spotjax.errors import SpotjaxError

Tokens = tuple[int, ...]


class StructureKind(StrEnum):
    """What a structure is written in; the API's fields have the same names."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Structure:
    """What all of a sequence's output must match.

    Attributes:
      kind: what it is written in.
      text: a JSON schema, a regular expression or a Lark grammar; empty for ``JSON_OBJECT``.
    """

    kind: StructureKind
    text: str = ""


class StructureFailed(SpotjaxError):
    """What a structure allows next cannot be told within the limits of its matcher, or nothing is allowed."""


class Matcher(Protocol):
    """Follows one sequence. What it has seen of it is a cache only: it is given all of the output each time.

    For one thread at a time.
    """

    def completed_by(self, tokens: Tokens, token: int) -> bool:
        """Whether one token more completes the structure, so that nothing but the end can follow.

        Raises:
          StructureFailed: the token is not allowed there, or that cannot be told.
        """
        ...


class GuidedRow(NamedTuple):
    """A row of a step that draws a token within a structure.

    Attributes:
      matcher: of the sequence.
      tokens: its output so far.
    """

    matcher: Matcher
    tokens: Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Which tokens some rows of a step may draw.

    Attributes:
      rows: of the step, those with a structure.
      words: (len(rows), W) int32: bit t % 32 of word t // 32 is set where token t may be drawn.
      failed: rows whose sequences cannot go on, and why; what they draw is dropped.
    """

    rows: tuple[int, ...]
    words: np.ndarray
    failed: Mapping[int, str]


class Guide(Protocol):
    """Makes matchers, and computes masks beside the event loop."""

    def matcher(self, structure: Structure, *, ends: bool) -> Matcher:
        """A matcher that has seen nothing yet; returns at once.

        Args:
          structure: that it keeps to.
          ends: whether the model's end tokens are allowed where the structure may end.
        """
        ...

    def masks(self, rows: Mapping[int, GuidedRow]) -> Future[Masks]:
        """Begins to compute what rows of a step may draw; returns at once."""
        ...
