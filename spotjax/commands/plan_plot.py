"""The timeline of a migration as a picture. The only module that needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from pathlib import Path

from spotjax.commands.plan import Study
from spotjax.errors import ConfigError
from spotjax.planner.plan import Phase
from spotjax.planner.timeline import timeline

COLOURS = {Phase.PRECOPY: "tab:cyan", Phase.FINAL: "tab:purple"}
LABELS = {Phase.PRECOPY: "parameters while decoding goes on", Phase.FINAL: "after the stop"}


def plot_timeline(study: Study, path: Path) -> None:
    """Writes a picture, one row for every link.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ConfigError("--plot needs matplotlib: pip install 'spotjax[plot]'") from problem
    timed = timeline(study.plan, study.links)
    offset = 0.0
    rows: dict[str, int] = {}
    bars: list[tuple[int, float, float, Phase]] = []
    for phase, entries in timed.items():
        for entry in entries:
            for link in study.links.between(entry.transfer.source, entry.transfer.target):
                row = rows.setdefault(f"{link.instance} {link.direction}", len(rows))
                bars.append((row, offset + entry.start, entry.end - entry.start, phase))
        offset = max((entry.end for entry in entries), default=0.0)
    figure = Figure(figsize=(10, 1.5 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for phase in Phase:
        for row in range(len(rows)):
            spans = [(start, length) for at, start, length, of in bars if (at, of) == (row, phase)]
            axes.broken_barh(spans, (row - 0.4, 0.8), color=COLOURS[phase], label=LABELS[phase] if row == 0 else None)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"{study.model}: migration to {study.placement.shape}")
    if rows:
        figure.legend(loc="outside lower center", ncols=2)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"the plot cannot be written: {problem}") from problem
