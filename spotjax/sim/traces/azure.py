"""Azure LLM inference traces (Splitwise, ISCA'24; CC-BY-4.0): ``TIMESTAMP,ContextTokens,GeneratedTokens`` with header.

``2023-11-16 18:17:03.9799600,4808,10``: when the request came, kept to microseconds, its prompt and its output tokens.
The first request comes at second 0.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from spotjax.sim.traces.lines import RequestColumns, bad_line, fields, numbered_lines, parsed
from spotjax.sim.workload import RequestTrace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def read_requests(path: str | Path) -> RequestTrace:
    """Reads a trace.

    Raises:
      ConfigError: the header is missing or a line is bad (see the module).
    """
    lines = numbered_lines(path)
    if not lines or lines[0][1] != HEADER:
        raise bad_line(path, 1, "no header", HEADER)
    requests, start = RequestColumns(), None

    def take(line: str) -> None:
        nonlocal start
        timestamp, prompt, output = fields(line, 3)
        time = datetime.fromisoformat(timestamp)
        if start is None:
            start = time
        if (time.tzinfo is None) is not (start.tzinfo is None):
            raise ValueError(f"{timestamp} has a time zone and others have none, or the other way round")
        requests.add((time - start).total_seconds(), int(prompt), int(output))

    for _ in parsed(path, lines[1:], take, "date and time,prompt tokens,output tokens, in order of time"):
        pass
    return requests.trace(path)
