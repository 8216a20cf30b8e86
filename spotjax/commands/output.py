"""Prints for machines: JSON of the dataclasses that clients get, one value a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from spotjax.engine.request import Logprobs
from spotjax.meshes.placement import Placement


def print_json(value: Any) -> None:
    """Prints a value on one line, at once."""
    print(msgspec.json.encode(plain(value)).decode(), flush=True)


def plain(value: Any) -> Any:
    """The value in terms of dict, list, str and numbers, under the field names of its dataclass."""
    match value:
        case Placement():
            return {
                "epoch": value.epoch,
                "shape": str(value.shape),
                "layers": value.layers,
                "devices": [
                    {"position": list(at), "instance": value.devices[at].instance, "index": value.devices[at].index}
                    for at in value.shape.positions()
                ],
            }
        case Logprobs():
            return {"logprob": value.token, "top": [{"token": token, "logprob": lp} for token, lp in value.top]}
        case Mapping():
            return {str(key): plain(part) for key, part in value.items()}
        case tuple() | list():
            return [plain(part) for part in value]
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def shown_bytes(count: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"
