"""Ledgers, and what stages tell them of steps that nobody runs."""

from __future__ import annotations

import numpy as np

from spotjax.worker.copying import Copying
from spotjax.worker.ledger import StageLedger

Row = tuple[int, int, int, list[int]]
"""Key, first position, positions and pages of one row of a step."""


def step(ledger: StageLedger, rows: list[Row], width: int = 32) -> None:
    """What a stage tells of a step, without running one."""
    keys, (told, pages) = [key for key, *_ in rows], arrays(rows, width)
    ledger.begin(keys, told, pages)
    ledger.written(keys, told)


def arrays(rows: list[Row], width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    told, pages = np.zeros((len(rows), 3), np.int32), np.zeros((len(rows), width), np.int32)
    for number, (_, start, length, owned) in enumerate(rows):
        told[number, :2] = start, length
        pages[number, : len(owned)] = owned
    return told, pages


def make_ledger(page_size: int = 4) -> StageLedger:
    return StageLedger(stage=None, page_size=page_size)  # type: ignore[arg-type]  # its bookkeeping needs none


def copy(copying: Copying, limit: int = 10) -> None:
    """What a round of copying tells."""
    copying.copied(copying.due(limit))
