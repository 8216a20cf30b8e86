"""Mooncake traces (FAST'25; Apache-2.0): JSON lines ``{"timestamp", "input_length", "output_length", "hash_ids"}``.

Milliseconds from the start, prompt tokens, output tokens. ``hash_ids`` name the blocks of the prompt that requests
share; they are ignored, because nothing that is simulated here reuses the KV of other requests.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from spotjax.sim.traces.lines import RequestColumns, as_seconds, numbered_lines, parsed
from spotjax.sim.workload import RequestTrace


class _Request(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


def read_requests(path: str | Path) -> RequestTrace:
    """Reads a trace.

    Raises:
      ConfigError: a line is bad (see the module).
    """
    requests, decoder = RequestColumns(), msgspec.json.Decoder(_Request)

    def take(line: str) -> None:
        row = decoder.decode(line)
        requests.add(as_seconds(row.timestamp / 1000), row.input_length, row.output_length)

    expected = '{"timestamp": milliseconds, "input_length": tokens, "output_length": tokens}, in order of time'
    for _ in parsed(path, numbered_lines(path), take, expected):
        pass
    return requests.trace(path)
