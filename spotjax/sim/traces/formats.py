"""Recognises the format of a trace file by its content. Changes nothing: see the methods of the traces for that."""

from __future__ import annotations

import re
from pathlib import Path

from spotjax.sim.traces import azure, mooncake, own, skypilot, spotserve
from spotjax.sim.traces.lines import bad_line, numbered_lines
from spotjax.sim.workload import RequestTrace, SpotTrace

_QUERY = re.compile(r"\d+,[0-9.eE+-]+,\d+,\d+")
_RECORD = re.compile(r"\d+,(add|remove),")


def open_requests(path: str | Path, output: int = spotserve.OUTPUT_TOKENS) -> RequestTrace:
    """Reads a request trace in any format that we know: see modules ``own``, ``azure``, ``mooncake``, ``spotserve``.

    To change its rate, cut a window or limit lengths, call ``scaled_to``, ``window`` or ``clipped`` on what it returns.

    Args:
      path: the file.
      output: new tokens of each request, where the format has none (SpotServe queries).

    Raises:
      ConfigError: the format is none of these, or a line is bad.
    """
    number, line = _first(path)
    if line == own.REQUEST_HEADER:
        return own.read_requests(path)
    if line == azure.HEADER:
        return azure.read_requests(path)
    if line.startswith("{") and '"input_length"' in line:
        return mooncake.read_requests(path)
    if _QUERY.fullmatch(line):
        return spotserve.read_queries(path, output)
    known = f"{own.REQUEST_HEADER!r}, {azure.HEADER!r}, a JSON line with input_length, or 'id,seconds,tokens,offset'"
    raise bad_line(path, number, "not the beginning of a request trace that we know", known)


def open_spot(path: str | Path) -> SpotTrace:
    """Reads a spot trace in any format that we know: see the modules ``own``, ``spotserve`` and ``skypilot``.

    To cut a window or limit the number of instances, call ``window`` or ``capped`` on what it returns. The throughput
    that a SpotServe segment requires is left out here.

    Raises:
      ConfigError: the format is none of these, or a line is bad.
    """
    number, line = _first(path)
    if line == own.SPOT_HEADER:
        return own.read_spot(path)
    if line.startswith("["):
        return spotserve.read_segment(path)[0]
    if _RECORD.match(line):
        return spotserve.read_record(path)
    if line.startswith("{"):
        return skypilot.read_counts(path)
    known = (
        f"{own.SPOT_HEADER!r}, a JSON line '[ms, \"add\", ...]', 'ms,add,instance', or JSON with gap_seconds and data"
    )
    raise bad_line(path, number, "not the beginning of a spot trace that we know", known)


def _first(path: str | Path) -> tuple[int, str]:
    """The first line that is neither empty nor a comment."""
    return next((entry for entry in numbered_lines(path) if not entry[1].startswith("#")), (1, ""))
