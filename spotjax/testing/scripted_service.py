"""Deterministic stand-ins, so that everything above the engine is tested without a device, in milliseconds.

``ScriptedService`` is a ``Service`` whose tokens are a pure function of prompt, seed, choice and position;
``ByteTokenizer`` is a tokenizer with one token for each byte.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from spotjax.engine.structure import Structure
from spotjax.errors import CheckpointError, InvalidRequest, NoFeasibleShape, NoSpareDevices, UnknownInstance
from spotjax.fleet.status import FleetEvent, FleetStatus, InstanceStatus, Reconfiguration, ReplicaStatus, Saved
from spotjax.meshes.instance import DeviceRef, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.testing.scripted_generation import ScriptedGeneration, ScriptedRequest

LAYERS = 4
DEVICES_PER_INSTANCE = 2


class ByteTokenizer:
    """One token for each byte of UTF-8; a start token, which ``encode`` puts in front, and an end token."""

    start_token = 256
    end_tokens = frozenset({257})
    vocab_size = 258

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Bytes of the text."""
        return [self.start_token] * add_special_tokens + list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes; incomplete characters at the end are left out."""
        text = bytes(token for token in tokens if token < 256).decode(errors="replace")
        return text.rstrip("\N{REPLACEMENT CHARACTER}")

    def token_bytes(self, token: int) -> bytes:
        """The byte; special tokens have a name."""
        return bytes([token]) if token < 256 else (b"<start>", b"<end>")[token - 256]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """A line for each tool, ``role: content`` lines with what else messages have, then the assistant's turn."""
        lines = [f"tool {tool['function']['name']}\n" for tool in tools]
        for message in messages:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            shown = "".join(f" {call['name']}({msgspec.json.encode(call['arguments']).decode()})" for call in calls)
            lines.append(f"{message['role']}: {message['content']}{shown}\n")
        return "".join(lines) + "assistant: "


class ScriptedStructures:
    """Takes any structure whose text does not begin with ``no``; the scripted service keeps to none."""

    async def check(self, structure: Structure) -> None:
        """See ``api.validation.Structures.check``."""
        if structure.text.startswith("no"):
            raise InvalidRequest(f"sampling.structure.{structure.kind}", f"refused as scripted: {structure.text!r}")


class ScriptedService(ScriptedGeneration):
    """A ``Service`` without engine or devices.

    Attributes:
      ready: what ``status`` says.
    """

    def __init__(
        self,
        delay: Callable[[], Awaitable[object]] | None = None,
        shape: MeshShape | None = None,
        spare_instances: int = 1,
        record: Callable[[], Awaitable[object]] | None = None,
        log: Iterable[ScriptedRequest] = (),
    ) -> None:
        """A service that is ready.

        Args:
          delay, record, log: see ``ScriptedGeneration``.
          shape: the mesh, by default 2x2x1.
          spare_instances: how many ``add`` can let join.
        """
        super().__init__(delay, record, log)
        self.ready = True
        self._spare = spare_instances
        self._events: list[FleetEvent] = []
        self._shape = shape or MeshShape(2, 2, 1)
        count = -(-self._shape.devices // DEVICES_PER_INSTANCE)
        self._checkpoints: set[str] = set()
        self._states = {f"i-{number}": InstanceState.READY for number in range(count)}
        self._placement: Placement | None = self._place(1)
        self._note("ready", f"serving on {self._shape}")

    def status(self) -> FleetStatus:
        """A snapshot."""
        running = self._unfinished()
        placement = self._placement
        return FleetStatus(
            model="scripted",
            ready=self.ready,
            draining=self._draining,
            placement=placement,
            instances=tuple(self._instance(name) for name in self._states),
            replicas=tuple(
                ReplicaStatus(d, running, 0, running, 64) for d in range(placement.shape.data if placement else 0)
            ),
            queued=0,
            requests_running=running,
            requests_finished=len(self.requests) - running,
            tokens_committed=sum(state.committed for state in self.requests.values()),
            reconfigurations=placement.epoch - 1 if placement else 0,
            uptime_seconds=1.5,
        )

    def recent(self) -> Sequence[FleetEvent]:
        """All events."""
        return tuple(self._events)

    async def watch(self, after: int = 0) -> AsyncIterator[FleetEvent]:
        """Events beyond the number ``after``."""
        seen = after
        while True:
            for event in self._events[seen:]:
                seen += 1
                yield event
            if self._stopped:
                return
            if seen == len(self._events):
                await self._changed.wait()

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """Takes an instance away without waiting; the mesh loses replicas until it fits."""
        self._require_alive(instance)
        self._states[instance] = InstanceState.GONE
        self._note("lost", f"{instance} is gone", instance=instance, seconds=grace_seconds)
        return self._reconfigure()

    async def release(self, instance: str) -> Reconfiguration:
        """Lets an instance leave if a mesh fits without it."""
        self._require_alive(instance)
        state, self._states[instance] = self._states[instance], InstanceState.GONE
        if self._place(0) is None:
            self._states[instance] = state
            raise NoFeasibleShape(f"no mesh fits without {instance}")
        self._note("draining", f"{instance} may leave", instance=instance)
        return self._reconfigure()

    async def add(self, count: int) -> Reconfiguration:
        """Lets spare instances join."""
        if count > self._spare:
            raise NoSpareDevices(f"{count} instances were asked for, devices for {self._spare} are left")
        self._spare -= count
        for _ in range(count):
            self._states[f"i-{len(self._states)}"] = InstanceState.READY
        self._note("joined", f"{count} joined", count=count)
        return self._reconfigure()

    async def save(self, directory: str, *, parameters: bool, state: bool, seconds: float) -> Saved:
        """Remembers which directories have parameters, and writes nothing; the last instance has no time for its KV."""
        if parameters and directory in self._checkpoints:
            raise CheckpointError(f"{directory} is a complete checkpoint already")
        self._checkpoints |= {directory} if parameters else set()
        self._note("saved", f"saved to {directory}", path=directory)
        running = self._unfinished()
        kept = (len(self.requests), running, 10 * running, 1 << 20) if state else (0, 0, 0, 0)
        return Saved(directory, (1 << 22) * parameters, *kept, tuple(self._alive()[-1:]) if state else (), 1.5)

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the accepted ones."""
        self._note("draining", "taking no new requests")
        return await self._finish(seconds)

    def _note(self, kind: str, message: str, **fields: str | int | float) -> None:
        epoch = self._placement.epoch if self._placement else 0
        self._events.append(FleetEvent(time.time(), kind, epoch, message, fields, len(self._events) + 1))
        self._changed.fire()

    def _require_alive(self, instance: str) -> None:
        if self._states.get(instance, InstanceState.GONE) is InstanceState.GONE:
            raise UnknownInstance(f"no instance {instance!r} is alive; there are {', '.join(self._alive()) or 'none'}")

    def _alive(self) -> list[str]:
        return [name for name, state in self._states.items() if state is not InstanceState.GONE]

    def _place(self, epoch: int) -> Placement | None:
        """As many replicas as the living instances hold, devices in order."""
        devices = [DeviceRef(name, index) for name in self._alive() for index in range(DEVICES_PER_INSTANCE)]
        replica = self._shape.stage * self._shape.tensor
        if len(devices) < replica:
            return None
        shape = replace(self._shape, data=len(devices) // replica)
        layers = split_layers(LAYERS, shape.stage)
        return Placement(epoch, shape, layers, dict(zip(shape.positions(), devices, strict=False)))

    def _reconfigure(self) -> Reconfiguration:
        before = self._placement
        epoch = (before.epoch if before else 0) + 1
        self._placement = self._place(epoch)
        self._note("switch", f"epoch {epoch}", pause_seconds=0.25)
        return Reconfiguration(
            epoch=epoch,
            before=before,
            after=self._placement,
            bytes_in_place=1 << 20,
            bytes_moved=1 << 19,
            bytes_loaded=0,
            precopy_seconds=0.5,
            pause_seconds=0.25,
            requests_kept=self._unfinished(),
            requests_recomputed=0,
        )

    def _instance(self, name: str) -> InstanceStatus:
        held = self._placement.devices.items() if self._placement else ()
        positions = {device.index: (at.data, at.stage, at.tensor) for at, device in held if device.instance == name}
        return InstanceStatus(name, "scripted", self._states[name], DEVICES_PER_INSTANCE, positions)
