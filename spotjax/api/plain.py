"""Dataclasses as plain values for JSON, under the names of their fields: what the command line and HTTP both print."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spotjax.engine.request import Logprobs
from spotjax.meshes.placement import Placement


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
