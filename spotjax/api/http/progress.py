"""Where in a stream a client is: the ids of events, which it sends back as ``Last-Event-ID`` to go on from there.

``3f2a:12.7f.-`` is of request 3f2a: of its first choice 12 tokens were sent, of the second all 7 and that it ended, of
the third nothing, not even how it opens. A final ``u`` says that the usage was sent, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self

from spotjax.errors import InvalidRequest

CHOICE = r"(?:-|\d{1,9}f?)"
EVENT_ID = re.compile(rf"([A-Za-z0-9_-]{{1,60}}):({CHOICE}(?:\.{CHOICE})*)(u?)")
FIELD = "Last-Event-ID"


@dataclass(slots=True)
class Progress:
    """What of one request was sent.

    Attributes:
      base: names the request; see ``generating``.
      tokens: of every choice; -1 where it has not opened.
      finished: choices whose end was sent.
      usage: whether the usage was.
    """

    base: str
    tokens: list[int]
    finished: set[int] = field(default_factory=set)
    usage: bool = False

    @classmethod
    def nothing(cls, base: str, choices: int) -> Self:
        """At the beginning."""
        return cls(base, [-1] * choices)

    @classmethod
    def of(cls, event_id: str, choices: int) -> Self:
        """What an event's id says.

        Raises:
          InvalidRequest: it is none, or of a request with another number of choices.
        """
        found = EVENT_ID.fullmatch(event_id)
        if found is None:
            raise InvalidRequest(FIELD, f"must be the id of an event of this server, got {event_id[:80]!r}")
        told = found[2].split(".")
        if len(told) != choices:
            raise InvalidRequest(FIELD, f"is of a request with {len(told)} choices, this one has {choices}")
        tokens = [-1 if choice == "-" else int(choice.rstrip("f")) for choice in told]
        return cls(found[1], tokens, {n for n, choice in enumerate(told) if choice.endswith("f")}, found[3] == "u")

    @property
    def event_id(self) -> str:
        """Of the event that brings a client here."""
        told = ".".join([self._shown(choice) for choice in range(len(self.tokens))])
        return f"{self.base}:{told}{'u' if self.usage else ''}"

    def _shown(self, choice: int) -> str:
        if self.tokens[choice] < 0:
            return "-"
        return f"{self.tokens[choice]}f" if choice in self.finished else str(self.tokens[choice])
