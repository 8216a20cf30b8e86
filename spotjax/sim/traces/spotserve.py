"""Files of the SpotServe artifact (ASPLOS'24, Apache-2.0): spot segments, the 12 h spot record, and queries.

- Segment, JSON lines: ``[120000, "add", {"nodes": ["node-7"]}]``: milliseconds, then ``add``, ``remove``, ``other``
  (no instances) or ``DONE`` (the last line: the end), then the instances and, in any line, ``required_tpt``: how many
  requests per second the system must be able to serve from then on.
- Record, CSV without header: ``480000,add,node1``: milliseconds, ``add`` or ``remove``, one instance.
- Queries, CSV without header: ``0,2.937844460333155,512,0``: id, seconds, prompt tokens, and the byte at which the
  prompt begins in another file, which we do not need. The number of output tokens is not in the file.

Whether an ``add`` is a grant or the time at which the instance is ready depends on the file: ``trace_*_real`` and
``_ondemand`` have a start-up time counted in, the others do not. The files do not say which instances are on demand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from spotjax.sim.traces.lines import (
    RequestColumns,
    SpotEvents,
    as_seconds,
    bad_line,
    fields,
    numbered_lines,
    parsed,
)
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace

OUTPUT_TOKENS = 128
"""New tokens of every request in the paper."""


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    nodes: list[str]
    required_tpt: float | None = None


class _Line(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    milliseconds: float
    kind: Literal["add", "remove", "other", "DONE"]
    change: _Change


def _segment_line(line: str) -> _Line:
    event = msgspec.json.decode(line, type=_Line)
    if bool(event.change.nodes) is not (event.kind in ("add", "remove")):
        raise ValueError(f"{event.kind!r} of {len(event.change.nodes)} nodes")
    if event.change.required_tpt is not None and event.change.required_tpt <= 0:
        raise ValueError(f"a required throughput of {event.change.required_tpt} requests/s")
    return event


def read_segment(path: str | Path) -> tuple[SpotTrace, list[tuple[float, float]]]:
    """Reads a spot segment.

    Returns:
      The trace, and (seconds, requests per second required from then on).

    Raises:
      ConfigError: a line is bad (see the module), or ``DONE`` is missing or not the last.
    """
    expected = '[milliseconds, "add" | "remove" | "other" | "DONE", {"nodes": [...], "required_tpt": optional}]'
    events, required, end = SpotEvents(), list[tuple[float, float]](), None

    def take(line: str) -> None:
        nonlocal end
        if end is not None:
            raise ValueError("a line after DONE")
        event = _segment_line(line)
        seconds, nodes = as_seconds(event.milliseconds / 1000), tuple(event.change.nodes)
        if event.kind == "DONE":
            end = seconds
        elif nodes:
            events.add(_event(seconds, event.kind, nodes))
        if event.change.required_tpt is not None:
            required.append((seconds, event.change.required_tpt))

    lines = numbered_lines(path)
    for _ in parsed(path, lines, take, expected):
        pass
    if end is None:
        raise bad_line(path, lines[-1][0] if lines else 1, "the trace ends without DONE", expected)
    return events.trace(path, end), required


def _event(seconds: float, kind: str, names: tuple[str, ...]) -> SpotEvent:
    return SpotEvent(seconds, added=names) if kind == "add" else SpotEvent(seconds, removed=names)


def _merged(trace: SpotTrace) -> SpotTrace:
    """With one event for all that happens at the same time, so that it is seen as one loss or one gain."""
    events: list[SpotEvent] = []
    for event in trace.events:
        last = events[-1] if events and events[-1].seconds == event.seconds else None
        if last is not None and not set(event.added) & set(last.removed):
            events[-1] = SpotEvent(event.seconds, last.added + event.added, last.removed + event.removed)
        else:
            events.append(event)
    return SpotTrace(trace.name, tuple(events), trace.duration)


def read_record(path: str | Path, duration: float | None = None) -> SpotTrace:
    """Reads a record of single instances that come and go.

    Args:
      path: the CSV file.
      duration: seconds; by default the time of the last line.

    Raises:
      ConfigError: a line is bad (see the module), or ``duration`` is before the last line.
    """
    events = SpotEvents()

    def take(line: str) -> None:
        milliseconds, kind, node = fields(line, 3)
        if kind not in ("add", "remove") or not node:
            raise ValueError(f"{kind!r} of instance {node!r}")
        events.add(_event(as_seconds(milliseconds) / 1000, kind, (node,)))

    for _ in parsed(path, numbered_lines(path), take, "milliseconds,add|remove,instance"):
        pass
    return _merged(events.trace(path, duration))


def read_queries(path: str | Path, output: int = OUTPUT_TOKENS) -> RequestTrace:
    """Reads queries.

    Args:
      path: the file.
      output: new tokens of each request.

    Raises:
      ConfigError: a line is bad (see the module).
    """
    requests = RequestColumns()

    def take(line: str) -> None:
        number, seconds, prompt, offset = fields(line, 4)
        int(number), int(offset)
        requests.add(as_seconds(seconds), int(prompt), output)

    for _ in parsed(path, numbered_lines(path), take, "id,seconds,prompt tokens,byte offset"):
        pass
    return requests.trace(path)
