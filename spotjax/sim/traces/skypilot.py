"""SkyPilot spot traces (Can't Be Late, NSDI'24): ``{"metadata": {"gap_seconds": 300}, "data": [0, 5, 16, ...]}``.

``data[k]`` is the number of instances that are there from ``k * gap_seconds`` on, in availability traces (what a launch
would have got) and in preemption traces (what was kept running) alike; other keys, such as ``prices``, are ignored.

Single-instance preemption files hold only 0 and 1, and nothing in them says which is which. We read 1 as *there*: the
README beside the data says that every point is a number of available instances, the four-instance preemption files are
counts (mostly 4), and the files of all zones we saw begin with one single 0, the point before the first launch. Files
that were converted for the simulator of that paper mean the opposite (1 is preempted): read those with ``inverted``.

Which instance goes is not recorded: the youngest does (``by_counts``).
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from spotjax.errors import ConfigError
from spotjax.sim.traces.lines import bad_line, read_text
from spotjax.sim.workload import SpotEvent, SpotTrace, by_counts

_EXPECTED = '{"metadata": {"gap_seconds": seconds}, "data": [instances at each point, ...]}'


class _Metadata(msgspec.Struct):
    gap_seconds: float


class _File(msgspec.Struct):
    metadata: _Metadata
    data: list[int]


def read_counts(path: str | Path, cap: int | None = None, inverted: bool = False) -> SpotTrace:
    """Reads a trace.

    Args:
      path: the JSON file.
      cap: no more instances than this are wanted at any time.
      inverted: 1 stands for preempted and 0 for there.

    Raises:
      ConfigError: the file is not as the module says.
    """
    gap, counts = _read(path, inverted)
    trace = by_counts(Path(path).stem, [(k * gap, count) for k, count in enumerate(counts)], len(counts) * gap)
    return trace if cap is None else trace.held(cap)


def shifted_windows(path: str | Path, instances: int, duration: float, inverted: bool = False) -> SpotTrace:
    """Many instances from the record of one: each is there when the one was, in a window of its own.

    The windows are spread evenly over the record. They overlap where ``instances * duration`` is more than the record;
    then instances repeat each other's fate some time later.

    Args:
      path: a file whose data are only 0 and 1.
      instances: how many windows.
      duration: seconds of each.
      inverted: see ``read_counts``.

    Raises:
      ConfigError: the file is not as the module says or has counts above 1, or the window is longer than the record.
    """
    gap, there = _read(path, inverted)
    ticks = round(duration / gap)
    if max(there) > 1:
        raise ConfigError(f"{path} has counts up to {max(there)}; windows are taken of the record of a single instance")
    if instances < 1 or not 1 <= ticks <= len(there):
        raise ConfigError(
            f"{instances} windows of {duration} s from {path}: it has {len(there) * gap} s in steps of {gap} s"
        )
    distance = (len(there) - ticks) // max(1, instances - 1)
    windows = [there[k * distance : k * distance + ticks] for k in range(instances)]
    events, lives = list[SpotEvent](), [0] * instances
    for tick in range(ticks):
        before = [window[tick - 1] if tick else 0 for window in windows]
        came = [k for k in range(instances) if windows[k][tick] > before[k]]
        gone = [k for k in range(instances) if windows[k][tick] < before[k]]
        removed = tuple(f"w{k}-{lives[k]}" for k in gone)
        for k in came:
            lives[k] += 1
        added = tuple(f"w{k}-{lives[k]}" for k in came)
        if added or removed:
            events.append(SpotEvent(tick * gap, added, removed))
    return SpotTrace(f"{Path(path).stem} x{instances}", tuple(events), ticks * gap)


def _read(path: str | Path, inverted: bool) -> tuple[float, list[int]]:
    """(seconds between points, instances at each)."""
    try:
        content = msgspec.convert(json.loads(read_text(path)), _File)
    except json.JSONDecodeError as error:
        raise bad_line(path, error.lineno, error.msg, _EXPECTED) from error
    except msgspec.ValidationError as error:
        raise bad_line(path, 1, error, _EXPECTED) from error
    if not 0 < content.metadata.gap_seconds < float("inf") or not content.data:
        problem = f"{len(content.data)} points, {content.metadata.gap_seconds} s apart"
        raise bad_line(path, 1, problem, _EXPECTED)
    most = 1 if inverted else max(content.data)
    for k, count in enumerate(content.data):
        if not 0 <= count <= most:
            raise bad_line(path, 1, f"data[{k}] is {count}", "0 or 1" if inverted else "0 or more instances")
    return content.metadata.gap_seconds, [1 - count for count in content.data] if inverted else content.data
