"""Frames of KV pages, as workers push them, and a small model's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_format import KvFormat
from spotjax.protocol.backup import BackedUpPage, BackupHeader

PAGE_SIZE = 4
FORM = KvFormat("service", "weights", layers=6, kv_heads=1, head_size=16, page_size=PAGE_SIZE, dtype="bfloat16")


def pages_of(sequence: int, positions: int) -> list[BackedUpPage]:
    """All pages of a sequence that has got so far."""
    count = -(-positions // PAGE_SIZE)
    return [BackedUpPage(sequence, n, min(positions, (n + 1) * PAGE_SIZE)) for n in range(count)]


def content(layers: tuple[int, int], pages: list[BackedUpPage], mark: int = 0) -> np.ndarray:
    """Bytes that tell layers, sequences and pages apart, as ``KvMover.host_pages`` lays them out."""
    half = FORM.row_bytes // 2
    cells = [
        [[np.random.default_rng((layer, page.sequence, page.number, part, mark)).bytes(half) for page in pages]
         for part in range(2)]
        for layer in range(*layers)
    ]  # fmt: skip
    return np.frombuffer(b"".join(cell for layer in cells for part in layer for cell in part), np.uint8)


def frame(
    layers: tuple[int, int],
    pages: list[BackedUpPage],
    mark: int = 0,
    source: str = "a",
    epoch: int = 1,
    service: str = FORM.service,
) -> tuple[BackupHeader, np.ndarray]:
    """What a worker pushes."""
    return BackupHeader(layers, tuple(pages), source, epoch, service), content(layers, pages, mark)


def save(directory: Path, *frames: tuple[BackupHeader, np.ndarray], name: str = "w", unit_bytes: int = 1 << 20) -> None:
    """Saves frames by a writer of that name."""
    writer = KvWriter(directory, name, FORM, unit_bytes)
    for header, pages in frames:
        writer.put(header, pages)
    writer.flush()
    writer.close()
