"""What the hosts of a TPU slice tell each other: host 0, which leads, and those that follow. Frame headers only.

Steps travel between them as ``StepHeader`` frames: from the leader to say that now is the step's turn, to the leader to
ask for a turn.
"""

from __future__ import annotations

import msgspec

from spotjax.meshes.slices import Range
from spotjax.protocol import reads

# -- to the leader


class Greeting(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The first frame of a follower's connection: which host it is."""

    host: int


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An order was carried out, or not; the payload is a ``control`` message: Ready, Done or Failed."""

    host: int
    number: int


class HostNoticed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A source says of this host's machine what it says of the slice then; the payload is a ``control`` message:
    Noticed or NoticeWithdrawn."""

    host: int


class HostLostStep(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """See ``control.StepLost``."""

    instance: str
    message: str


# -- to the followers


class Order(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Carry out what the controller wants; the payload is its ``control`` message: Welcome, Forget or a command.

    Attributes:
      number: that the answer carries.
    """

    number: int


class Superseded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reads for the order at work are of no use any more."""


class SliceEnds(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The slice is not needed any more: free everything and end with this exit code."""

    code: int


SliceFrame = Greeting | Answer | HostNoticed | HostLostStep | Order | Superseded | SliceEnds


class ReadHeads(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A bulk read between hosts: KV pages as for ``reads.ReadPages``, but of some kv heads only, all on that host."""

    epoch: int
    replica: int
    layers: Range
    pages: tuple[int, ...]
    heads: tuple[int, ...]


decode_read = msgspec.msgpack.Decoder(reads.Read | ReadHeads).decode
