"""Results in files: JSON of runs, read back as it was written. Field names are part of the interface, only added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from spotjax.errors import ConfigError
from spotjax.sim.results import Outcome, Summary
from spotjax.sim.world import Change

VERSION = 1
COLUMNS = ("arrival", "prompt", "output", "first_token", "finish", "largest_gap", "restarts", "recomputed")


@dataclass(frozen=True)
class Record:
    """What is kept of one run.

    Attributes:
      summary: its numbers.
      instances: (seconds, instances paid for from then on) at every change of their number.
      changes: of the mesh, in order.
      columns: of all requests, by their names in ``Outcome``; None where it did not come. Empty if they are not kept.
    """

    summary: Summary
    instances: tuple[tuple[float, int], ...]
    changes: tuple[Change, ...]
    columns: dict[str, list[float | None]]

    @classmethod
    def of(cls, outcome: Outcome, summary: Summary, columns: bool = False) -> Record:
        """Of an outcome and its summary, with what became of every request or without."""
        kept = {name: _plain(getattr(outcome, name)) for name in COLUMNS} if columns else {}
        return cls(summary, outcome.instances, outcome.changes, kept)


@dataclass(frozen=True)
class RecordFile:
    """What a file holds.

    Attributes:
      runs: in the order in which they were made.
      assumptions: parameters of all of them, by name.
      version: of the format.
    """

    runs: tuple[Record, ...]
    assumptions: dict[str, float]
    version: int = VERSION


def encode(runs: Sequence[Record], assumptions: dict[str, float]) -> bytes:
    """JSON of runs, ending in a line break."""
    return msgspec.json.encode(RecordFile(tuple(runs), assumptions)) + b"\n"


def decode(content: bytes) -> RecordFile:
    """Reads what ``encode`` wrote.

    Raises:
      ConfigError: it did not; the message says what is wrong, and where.
    """
    try:
        file = msgspec.json.decode(content, type=RecordFile)
    except msgspec.DecodeError as problem:
        raise ConfigError(f"not results of spotjax simulate: {problem}") from problem
    if file.version != VERSION:
        raise ConfigError(f"results are in format {file.version}, only {VERSION} can be read")
    return file


def _plain(column: np.ndarray[tuple[int], np.dtype[np.generic]]) -> list[float | None]:
    values: list[float | None] = column.tolist()
    return [None if value != value else value for value in values]  # nan is no JSON
