"""Prints for machines: JSON of the dataclasses that clients get, one value a line."""

from __future__ import annotations

from typing import Any

import msgspec

from spotjax.api.plain import plain


def print_json(value: Any) -> None:
    """Prints a value on one line, at once."""
    print(msgspec.json.encode(plain(value)).decode(), flush=True)


def shown_bytes(count: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"
