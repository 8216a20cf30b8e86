"""The logical mesh: its shape and its positions. Knows nothing of devices or of what is stored where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """A place in the mesh: replica ``data``, pipeline stage ``stage``, tensor shard ``tensor``."""

    data: int
    stage: int
    tensor: int


@dataclass(frozen=True, slots=True, order=True)
class MeshShape:
    """Degrees of data, pipeline and tensor parallelism (D, P, M), each at least 1.

    Raises:
      ValueError: a degree is below 1.
    """

    data: int
    stage: int
    tensor: int

    def __post_init__(self) -> None:
        for name in ("data", "stage", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} degree must be at least 1, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads ``"2x3x1"`` as data 2, stage 3, tensor 1.

        Raises:
          ValueError: the text is not three positive integers joined by ``x``.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"a mesh shape is DATAxSTAGExTENSOR such as 2x3x1, got {text!r}")
        return cls(*map(int, parts))

    @property
    def devices(self) -> int:
        """Number of devices that the mesh takes."""
        return self.data * self.stage * self.tensor

    def positions(self) -> Iterator[Position]:
        """All positions in (data, stage, tensor) order."""
        for d in range(self.data):
            for p in range(self.stage):
                for m in range(self.tensor):
                    yield Position(d, p, m)

    def __str__(self) -> str:
        return f"{self.data}x{self.stage}x{self.tensor}"
