"""How a worker puts copies of KV pages into another worker's host memory: one frame for some pages of some layers."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from spotjax.meshes.slices import Range


class BackedUpPage(NamedTuple):
    """One page of one sequence.

    Attributes:
      sequence: its key.
      number: of the page in the sequence.
      positions: of the sequence, from the first on, that are backed up when this page and those before it are.
    """

    sequence: int
    number: int
    positions: int


class BackupHeader(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Pages for the receiver to keep; the payload is as ``KvMover.host_pages`` lays it out.

    Attributes:
      layers: of the model.
      pages: in order; those of one sequence by number.
      source: what copies; a sequence's copies begin with its first page for each.
      epoch: that the source's stage was last adopted in.
      service: the controller whose sequences these are.
    """

    layers: Range
    pages: tuple[BackedUpPage, ...]
    source: str = ""
    epoch: int = 0
    service: str = ""
