"""What one worker asks another for in bulk. The answer is raw bytes whose size both sides know."""

from __future__ import annotations

import msgspec

from spotjax.meshes.slices import Index, Range
from spotjax.transport.decoding import decoder_of


class ReadSlice(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A slice of a parameter: its elements in order.

    Attributes:
      device: number of the device that has it.
      name, index: of the slice.
    """

    device: int
    name: str
    index: Index


class ReadPages(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """KV pages of a replica's current stage, as ``KvMover.host_pages`` lays them out.

    Attributes:
      epoch: of the placement that the replica belongs to; another one is refused.
      replica: its number.
      layers: of the model.
      pages: page numbers.
    """

    epoch: int
    replica: int
    layers: Range
    pages: tuple[int, ...]


class ReadBackup(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """KV pages that another worker backed up here, laid out in the same way.

    Attributes:
      layers: of the model.
      owners: (key of the sequence, number of the page in it) of each page.
    """

    layers: Range
    owners: tuple[tuple[int, int], ...]


Read = ReadSlice | ReadPages | ReadBackup
encode = msgspec.msgpack.Encoder().encode
decode = decoder_of(Read)
