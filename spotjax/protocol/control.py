"""What controller and worker tell each other over the control stream: one gRPC call, messages both ways, in order.

The worker registers, is welcomed or refused, gets ready, then answers one command after another. The stream's end is
the worker's end as far as the fleet is concerned; it may register again. Messages only; who sends what when is in
``fleet.sessions`` and ``worker.session``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from spotjax.meshes.instance import DeviceRef, InstanceType
from spotjax.meshes.layout import LayerRanges
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import Index, Range
from spotjax.models.quantization import Quantization
from spotjax.planner.plan import Transfer
from spotjax.reshard.transfer import PageTransfer
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant
from spotjax.transport.decoding import decoder_of

METHOD = "/spotjax.v1.Workers/Join"
VERSION = 6
"""Both sides must speak the same."""
NONCE_KEY, PROOF_KEY = "spotjax-nonce", "spotjax-proof"
"""Metadata in which worker and controller, and the controller alone, prove that they have the join token; in hex."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""What the controller's port takes of anybody."""
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),  # notice within seconds that the controller's machine died
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)
"""Of the worker's channel."""


class PlacementMessage(msgspec.Struct, frozen=True):
    """A ``Placement``."""

    epoch: int
    shape: MeshShape
    layers: LayerRanges
    devices: tuple[tuple[Position, DeviceRef], ...]

    @classmethod
    def of(cls, placement: Placement) -> PlacementMessage:
        """The message for a placement."""
        return cls(placement.epoch, placement.shape, placement.layers, tuple(placement.devices.items()))

    def placement(self) -> Placement:
        """The placement of a message."""
        return Placement(self.epoch, self.shape, self.layers, dict(self.devices))


class Parts(msgspec.Struct, frozen=True):
    """Parts of parameters that one device has or needs.

    Attributes:
      device: its number in the instance.
      arrays: array or stack name to index ranges.
    """

    device: int
    arrays: dict[str, Index]


class ModelSetup(msgspec.Struct, frozen=True):
    """All that a worker must know to serve a model as the others do.

    Attributes:
      model: as ``models.catalog.open_model`` takes it.
      fingerprint: of its weights, to be the same everywhere.
      dtype: of parameters and KV.
      pages, page_size: KV of one replica, page 0 included.
      max_positions, max_batch, prefill_tokens: what buckets are made of.
      degrees: tensor degrees to be compiled ahead.
      quantization: of matrices; else they are as all other parameters.
    """

    model: str
    fingerprint: str
    dtype: str
    pages: int
    page_size: int
    max_positions: int
    max_batch: int
    prefill_tokens: int
    degrees: tuple[int, ...]
    quantization: Quantization = "none"


class StageRemains(msgspec.Struct, frozen=True, array_like=True):
    """KV that one stage still has.

    Attributes:
      replica, stage: its place in the mesh.
      sequences: (key, its pages in order, positions whose KV is in them).
    """

    replica: int
    stage: int
    sequences: tuple[tuple[int, tuple[int, ...], int], ...]


# -- worker to controller


class Proof(msgspec.Struct, frozen=True, tag=True):
    """That the worker has the fleet's join token, where there is one; before anything else.

    Attributes:
      proof: see ``transport.join_token``; over the numbers in the metadata of both sides.
    """

    proof: bytes


class Register(msgspec.Struct, frozen=True, tag=True):
    """The first message of a stream.

    Attributes:
      version: of this protocol.
      instance: name, unique in the fleet.
      incarnation: differs between processes of that name.
      kind: what the machine has; memory 0 where devices do not know.
      platform: of its devices, as jax calls it.
      on_demand: not rented at the spot price.
      zone: where it is, empty if unknown.
      address: HOST:PORT of its data endpoint, as others reach it.
    """

    version: int
    instance: str
    incarnation: str
    kind: InstanceType
    platform: str
    on_demand: bool
    zone: str
    address: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Compiled and loaded; can be given work.

    Attributes:
      held: parameters still in memory, or attached to.
      compiled: functions compiled so far while somebody could have waited.
      placement: the mesh of which it still has stages with their KV, from the time of an earlier controller.
      copies: whether it still has copies of others' KV from that time.
    """

    held: tuple[Parts, ...]
    compiled: int
    placement: PlacementMessage | None = None
    copies: bool = False


class Done(msgspec.Struct, frozen=True, tag=True):
    """A command was carried out.

    Attributes:
      id: of the command.
      moved, loaded: bytes, see ``reshard.transfer.Traffic``.
      compiled: functions compiled so far while somebody could have waited.
      positions: what ``Coverage`` asked for, by sequence.
      remains: what ``Reunite`` asked for.
      left_out: why ``SaveKv`` did not save all there was; empty if it did.
    """

    id: int
    moved: int = 0
    loaded: int = 0
    compiled: int = 0
    positions: tuple[int, ...] = ()
    remains: tuple[StageRemains, ...] = ()
    left_out: str = ""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A command was not carried out.

    Attributes:
      id: of the command.
      unreachable: the instance that could not be read from, empty for another reason.
      message: what went wrong.
    """

    id: int
    unreachable: str
    message: str


class Noticed(msgspec.Struct, frozen=True, tag=True):
    """A source says that the machine will be taken; its word replaces the one that it gave before.

    Attributes:
      source: as in ``notice.Notice``.
      kind: as in ``NoticeKind``.
      seconds: until the machine is gone; None for advice, which has no end.
      evidence: what the source says, shortened.
    """

    source: str
    kind: Literal["rebalance", "maintenance", "preempt", "lost"]
    seconds: float | None
    evidence: str


class NoticeWithdrawn(msgspec.Struct, frozen=True, tag=True):
    """That source takes its word back."""

    source: str
    evidence: str


class StepLost(msgspec.Struct, frozen=True, tag=True):
    """A step ended here: it could not be run, or not be sent on.

    Attributes:
      instance: the one at fault: the worker itself, or the one that cannot be reached.
      message: what went wrong.
    """

    instance: str
    message: str


class StageWork(msgspec.Struct, frozen=True, array_like=True):
    """What a worker's stage has done since the worker has had it.

    Attributes:
      replica, stage: its place in the mesh.
      steps: that it ran.
      seconds: of these together, each from its dispatch, or from the end of the one before, to its result.
    """

    replica: int
    stage: int
    steps: int
    seconds: float


class DeviceMemory(msgspec.Struct, frozen=True, array_like=True):
    """Memory of a device whose backend tells.

    Attributes:
      device: its number in the instance.
      used, limit: bytes.
    """

    device: int
    used: int
    limit: int


class Vitals(msgspec.Struct, frozen=True, tag=True):
    """How a worker is, every few seconds, for operators to see. What is counted is since its process began.

    Attributes:
      stages: those that it has.
      devices: those whose backend tells of memory.
      sent, received: bytes on connections with other processes of the fleet, bulk reads included.
      moved, loaded: bytes that commands brought here, see ``reshard.transfer.Traffic``.
      backup: bytes of copies of others' KV.
      resident: bytes of host memory.
      cpu_seconds: of processor time.
      compiled: functions compiled while somebody could have waited.
    """

    stages: tuple[StageWork, ...] = ()
    devices: tuple[DeviceMemory, ...] = ()
    sent: int = 0
    received: int = 0
    moved: int = 0
    loaded: int = 0
    backup: int = 0
    resident: int = 0
    cpu_seconds: float = 0.0
    compiled: int = 0


FromWorker = Proof | Register | Ready | Done | Failed | Noticed | NoticeWithdrawn | StepLost | Vitals


# -- controller to worker


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The answer to ``Register``.

    Attributes:
      setup: what to get ready.
      data_port: of the controller's data endpoint, on the host that the worker joined at.
      lease_seconds: how long the fleet waits for a sign of life.
      service: tells the requests of one commit log from those of another, whose sequences have the same keys.
      epoch: of the last mesh; copies of KV that are sent under it, or one before, come too late.
      reunion: whether KV that is still there from that service's last controller may be of use; else it is given up.
    """

    setup: ModelSetup
    data_port: int
    lease_seconds: float
    service: str
    epoch: int
    reunion: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The other answer.

    Attributes:
      reason: one line.
      retry: whether trying again can help.
    """

    reason: str
    retry: bool


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Bring parameters into place for a new placement, and make room for KV; see ``reshard.transfer.Preparation``.

    Attributes:
      id: of the command.
      placement: the new one.
      current: the one that KV comes from.
      needs: what this worker's devices must have, by stack.
      transfers: what of it has to come from elsewhere.
      heirs, carried: see ``Preparation``.
      backups: the instance that has a copy of the KV of a stage of ``current``, by replica and stage.
      addresses: data endpoint of every instance.
      steps: shapes and sampling variants of what will soon be run, and whether with masks, to be made ready to run.
    """

    id: int
    placement: PlacementMessage
    current: PlacementMessage | None
    needs: tuple[Parts, ...]
    transfers: tuple[Transfer, ...]
    heirs: dict[int, int]
    carried: dict[int, int]
    backups: tuple[tuple[tuple[int, int], str], ...]
    addresses: dict[str, str]
    steps: tuple[tuple[StepShape, Variant, bool], ...]


class CopyPages(msgspec.Struct, frozen=True, tag=True):
    """Copy KV pages into the prepared stages while steps go on."""

    id: int
    transfers: tuple[PageTransfer, ...]


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Complete the KV of the prepared stages."""

    id: int
    transfers: tuple[PageTransfer, ...]


class Adopt(msgspec.Struct, frozen=True, tag=True):
    """Make the prepared placement the current one.

    Attributes:
      id: of the command.
      pipelines: name of every replica's pipeline; steps carry it.
      keeper: the instance that keeps a copy of this one's KV; empty for none.
      bandwidth: bytes per second that copying may take; 0 for no limit.
    """

    id: int
    pipelines: tuple[str, ...]
    keeper: str
    bandwidth: int


class Clear(msgspec.Struct, frozen=True, tag=True):
    """Give up the current placement with its KV, and copies of others' KV; parameters stay."""

    id: int


class Reunite(msgspec.Struct, frozen=True, tag=True):
    """A controller that started again goes on with these sequences: what of their KV is there? Answered in ``Done``.

    Attributes:
      id: of the command.
      epoch: of the mesh that is taken up; stages of another are given up, and so is all KV but what is asked for.
      sequences: (key, positions whose tokens are certain).
    """

    id: int
    epoch: int
    sequences: tuple[tuple[int, int], ...]


class SaveKv(msgspec.Struct, frozen=True, tag=True):
    """Save the KV of the current stages into a directory that others save into, too, while steps go on.

    Attributes:
      id: of the command.
      path: of the directory.
      seconds: for all of it, when ``last``.
      last: save what there is now and end. Else begin, and go on in the background until told so.
    """

    id: int
    path: str
    seconds: float
    last: bool


class SaveParameters(msgspec.Struct, frozen=True, tag=True):
    """Save the parameters of this worker's stages of replica 0 into a checkpoint; others save the rest.

    Attributes:
      id: of the command.
      path: of the checkpoint.
    """

    id: int
    path: str


class Coverage(msgspec.Struct, frozen=True, tag=True):
    """How much KV of these sequences are there copies of at the worker, over all these layers? Answered in ``Done``.

    Attributes:
      id: of the command.
      layers: of the model.
      sequences: keys.
      save: directory of a save of KV that counts as a copy from now on; empty for none.
      saved: (key of a sequence, positions of it that count) of what is in there.
    """

    id: int
    layers: Range
    sequences: tuple[int, ...]
    save: str = ""
    saved: tuple[tuple[int, int], ...] = ()


class Forget(msgspec.Struct, frozen=True, tag=True):
    """These sequences have ended. Has no answer."""

    sequences: tuple[int, ...]


class Release(msgspec.Struct, frozen=True, tag=True):
    """Leave the fleet.

    Attributes:
      at_once: without finishing anything, as if the machine were taken.
    """

    at_once: bool


Command = Prepare | CopyPages | Switch | Adopt | Clear | Reunite | Coverage | SaveKv | SaveParameters
FromController = Welcome | Refused | Command | Forget | Release


def encode(message: Any) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


decode_from_worker = decoder_of(FromWorker)
decode_from_controller = decoder_of(FromController)
