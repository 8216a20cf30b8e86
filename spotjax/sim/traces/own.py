"""Our own formats, to read and to write: UTF-8 CSV without quotes; empty lines and those after ``#`` are skipped.

Requests: the header ``seconds,prompt,output``, then one line each: seconds from the start, never falling, prompt tokens
and output tokens, both at least 1.

    seconds,prompt,output
    0.25,512,128

Spot: the header ``seconds,added,removed,on_demand``, then one line per event, and the end as the last line. Names are
joined by spaces and are free of spaces, commas and control characters; ``on_demand`` is 1 where those that come are
rented at the on-demand price, else 0.

    seconds,added,removed,on_demand
    0.0,node-0 node-1,,0
    600.0,node-2,node-0,0
    1320.0,END

A trace that is written and read again is the same, to the last bit of its times; it is named as the file.
"""

from __future__ import annotations

from pathlib import Path

from spotjax.errors import ConfigError
from spotjax.sim.traces.lines import RequestColumns, SpotEvents, as_seconds, bad_line, fields, numbered_lines, parsed
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace

REQUEST_HEADER = "seconds,prompt,output"
SPOT_HEADER = "seconds,added,removed,on_demand"


def read_requests(path: str | Path) -> RequestTrace:
    """Reads requests.

    Raises:
      ConfigError: the header is missing or a line is bad.
    """
    requests = RequestColumns()

    def take(line: str) -> None:
        seconds, prompt, output = fields(line, 3)
        requests.add(as_seconds(seconds), int(prompt), int(output))

    for _ in parsed(path, _lines(path, REQUEST_HEADER), take, "seconds,prompt tokens,output tokens, in order of time"):
        pass
    return requests.trace(path)


def write_requests(path: str | Path, trace: RequestTrace) -> None:
    """Writes requests."""
    rows = zip(trace.arrival.tolist(), trace.prompt.tolist(), trace.output.tolist(), strict=True)
    lines = [REQUEST_HEADER, *(f"{seconds!r},{prompt},{output}" for seconds, prompt, output in rows)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_spot(path: str | Path) -> SpotTrace:
    """Reads what a market gives and takes.

    Raises:
      ConfigError: the header or the end is missing, or a line is bad.
    """
    expected = "seconds,names that come,names that go,0 or 1; as the last line: seconds,END"
    lines = _lines(path, SPOT_HEADER)
    if not lines or not lines[-1][1].endswith(",END"):
        raise bad_line(path, lines[-1][0] if lines else 1, "the trace has no end", expected)
    (end,) = parsed(path, lines[-1:], lambda line: as_seconds(fields(line, 2)[0]), expected)
    events = SpotEvents()
    for _ in parsed(path, lines[:-1], lambda line: events.add(_event(line)), expected):
        pass
    return events.trace(path, end)


def write_spot(path: str | Path, trace: SpotTrace) -> None:
    """Writes what a market gives and takes.

    Raises:
      ConfigError: a name cannot be written.
    """
    for event in trace.events:
        for name in (*event.added, *event.removed):
            if not name or "," in name or not name.isprintable() or len(name.split()) != 1 or name != name.strip():
                raise ConfigError(f"spot trace {trace.name}: an instance named {name!r} cannot be written")
    rows = [
        f"{event.seconds!r},{' '.join(event.added)},{' '.join(event.removed)},{int(event.on_demand)}"
        for event in trace.events
    ]
    Path(path).write_text("\n".join([SPOT_HEADER, *rows, f"{trace.duration!r},END"]) + "\n", encoding="utf-8")


def _event(line: str) -> SpotEvent:
    seconds, added, removed, on_demand = fields(line, 4)
    if on_demand not in ("0", "1"):
        raise ValueError(f"{on_demand!r} for on_demand")
    return SpotEvent(as_seconds(seconds), tuple(added.split()), tuple(removed.split()), on_demand == "1")


def _lines(path: str | Path, header: str) -> list[tuple[int, str]]:
    """The lines below the header."""
    lines = [(number, line) for number, line in numbered_lines(path) if not line.startswith("#")]
    if not lines or lines[0][1] != header:
        raise bad_line(path, lines[0][0] if lines else 1, "no header", header)
    return lines[1:]
