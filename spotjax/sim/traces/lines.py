"""Trace files line by line: what every reader needs to say which line is wrong and why. Knows no format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import TypeVar

import msgspec

from spotjax.errors import ConfigError
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace

Parsed = TypeVar("Parsed")


def read_text(path: str | Path) -> str:
    """The text of a trace file.

    Raises:
      ConfigError: it cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """(line number, text) of every line that has any text, ends stripped."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def bad_line(path: str | Path, number: int, problem: object, expected: str) -> ConfigError:
    """The error that every reader raises about a line."""
    return ConfigError(f"{path}, line {number}: {problem}; expected {expected}")


def parsed(
    path: str | Path, lines: Iterable[tuple[int, str]], parse: Callable[[str], Parsed], expected: str
) -> Iterator[Parsed]:
    """Every line through ``parse``; what that raises becomes an error that names file and line.

    Args:
      path: for the message.
      lines: as ``numbered_lines`` gives them.
      parse: raises ``ValueError`` or ``msgspec.DecodeError`` at a bad line.
      expected: what a good line looks like.

    Raises:
      ConfigError: a line is bad.
    """
    for number, line in lines:
        try:
            yield parse(line)
        except (ValueError, msgspec.DecodeError) as error:
            raise bad_line(path, number, error, expected) from error


def fields(line: str, count: int) -> list[str]:
    """The fields of a line of comma-separated values without quotes.

    Raises:
      ValueError: there are more or fewer.
    """
    values = [value.strip() for value in line.split(",")]
    if len(values) != count:
        raise ValueError(f"{len(values)} fields instead of {count}")
    return values


def as_seconds(text: str | float) -> float:
    """A point in time.

    Raises:
      ValueError: it is no number, not finite, or before 0.
    """
    seconds = float(text)
    if not isfinite(seconds) or seconds < 0:
        raise ValueError(f"a time of {text}")
    return seconds


class RequestColumns:
    """Requests as they are read, one after the other."""

    def __init__(self) -> None:
        self._arrival: list[float] = []
        self._prompt: list[int] = []
        self._output: list[int] = []

    def add(self, seconds: float, prompt: int, output: int) -> None:
        """One more.

        Raises:
          ValueError: it comes before the one before, or has no prompt or no output.
        """
        if self._arrival and seconds < self._arrival[-1]:
            raise ValueError(f"an arrival at {seconds} s after one at {self._arrival[-1]} s")
        if prompt < 1 or output < 1:
            raise ValueError(f"a request of {prompt} prompt and {output} output tokens")
        self._arrival.append(seconds)
        self._prompt.append(prompt)
        self._output.append(output)

    def trace(self, path: str | Path) -> RequestTrace:
        """All of them, named as the file.

        Raises:
          ConfigError: there are none.
        """
        if not self._arrival:
            raise ConfigError(f"trace {path} has no requests")
        return RequestTrace.of(Path(path).stem, self._arrival, self._prompt, self._output)


class SpotEvents:
    """Events of a spot trace as they are read, one after the other."""

    def __init__(self) -> None:
        self._events: list[SpotEvent] = []
        self._there: set[str] = set()

    def add(self, event: SpotEvent) -> None:
        """One more.

        Raises:
          ValueError: it comes before the one before, an instance comes that is there, or goes that is not.
        """
        if self._events and event.seconds < self._events[-1].seconds:
            raise ValueError(f"an event at {event.seconds} s after one at {self._events[-1].seconds} s")
        for name in event.added:
            if name in self._there:
                raise ValueError(f"instance {name} comes but is there already")
            self._there.add(name)
        for name in event.removed:
            if name not in self._there:
                raise ValueError(f"instance {name} goes but is not there")
            self._there.remove(name)
        self._events.append(event)

    def trace(self, path: str | Path, duration: float | None = None) -> SpotTrace:
        """All of them, named as the file; by default the last is the end.

        Raises:
          ConfigError: there are none, or the last is after the end.
        """
        if not self._events and duration is None:
            raise ConfigError(f"trace {path} has no events")
        end = self._events[-1].seconds if duration is None else duration
        return SpotTrace(Path(path).stem, tuple(self._events), end)
