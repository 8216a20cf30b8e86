"""Deterministic stand-ins, so that everything above the engine is tested without a device, in milliseconds.

``ScriptedService`` is a ``Service`` whose tokens are a pure function of prompt, seed, choice and position;
``ByteTokenizer`` is a tokenizer with one token for each byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.engine.request import FinishReason
from spotjax.errors import (
    Draining,
    InvalidRequest,
    NoFeasibleShape,
    NoSpareDevices,
    Overloaded,
    UnknownInstance,
    UnknownRequest,
)
from spotjax.fleet.status import FleetEvent, FleetStatus, InstanceStatus, Reconfiguration, ReplicaStatus
from spotjax.meshes.instance import DeviceRef, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.scripted_generation import ScriptedRequest, scripted_tokens

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

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """``role: content`` lines, then the assistant's turn."""
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


class Signal:
    """Wakes everybody who waits."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wakes those who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Waits for the next ``fire``."""
        await self._event.wait()


class ScriptedService:
    """A ``Service`` without engine or devices.

    Attributes:
      overloaded: refuse new requests as if the queue were full.
      ready: what ``status`` says.
      requests: everything accepted, by id.
    """

    def __init__(
        self,
        delay: Callable[[], Awaitable[object]] | None = None,
        shape: MeshShape | None = None,
        spare_instances: int = 1,
    ) -> None:
        """A service that is ready.

        Args:
          delay: awaited before each token of each request; a semaphore's ``acquire`` lets tests count them out.
          shape: the mesh, by default 2x2x1.
          spare_instances: how many ``add`` can let join.
        """
        self.overloaded = False
        self.ready = True
        self.requests: dict[str, ScriptedRequest] = {}
        self._delay = delay
        self._spare = spare_instances
        self._draining = False
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: list[FleetEvent] = []
        self._changed = Signal()
        self._shape = shape or MeshShape(2, 2, 1)
        count = -(-self._shape.devices // DEVICES_PER_INSTANCE)
        self._states = {f"i-{number}": InstanceState.READY for number in range(count)}
        self._placement: Placement | None = self._place(1)
        self._record("ready", f"serving on {self._shape}")

    def submit(self, request: GenerationRequest) -> None:
        """Accepts a request and starts to commit its tokens."""
        if self._draining:
            raise Draining("the server is draining and takes no new requests; try another one")
        if self.overloaded:
            raise Overloaded("the queue is full", retry_after=1.5)
        if request.request_id in self.requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is taken")
        script = [scripted_tokens(request, choice) for choice in range(request.n)]
        state = self.requests[request.request_id] = ScriptedRequest(request, script)
        task = asyncio.create_task(self._run(state))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """Output from ``offsets`` on."""
        state = self._find(request_id)
        if offsets and len(offsets) != state.request.n:
            raise InvalidRequest("offsets", f"one for each of the {state.request.n} choices, got {len(offsets)}")
        for choice, offset in enumerate(offsets):
            known = min(state.committed, len(state.script[choice][0]))
            if offset > known:
                raise InvalidRequest(f"offsets[{choice}]", f"must be in [0, {known}], got {offset}")
        return self._stream(state, list(offsets) or [0] * state.request.n)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """Ends a request."""
        state = self._find(request_id)
        if state.finished:
            return False
        state.ended = FinishReason(reason)
        self._changed.fire()
        return True

    def status(self) -> FleetStatus:
        """A snapshot."""
        running = self._running()
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

    async def watch(self) -> AsyncIterator[FleetEvent]:
        """Events from the first on."""
        seen = 0
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
        self._record("lost", f"{instance} is gone", instance=instance, seconds=grace_seconds)
        return self._reconfigure()

    async def release(self, instance: str) -> Reconfiguration:
        """Lets an instance leave if a mesh fits without it."""
        self._require_alive(instance)
        state, self._states[instance] = self._states[instance], InstanceState.GONE
        if self._place(0) is None:
            self._states[instance] = state
            raise NoFeasibleShape(f"no mesh fits without {instance}")
        self._record("draining", f"{instance} may leave", instance=instance)
        return self._reconfigure()

    async def add(self, count: int) -> Reconfiguration:
        """Lets spare instances join."""
        if count > self._spare:
            raise NoSpareDevices(f"{count} instances were asked for, devices for {self._spare} are left")
        self._spare -= count
        for _ in range(count):
            self._states[f"i-{len(self._states)}"] = InstanceState.READY
        self._record("joined", f"{count} joined", count=count)
        return self._reconfigure()

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the accepted ones."""
        self._draining = True
        self._record("draining", "taking no new requests")
        _, late = await asyncio.wait(self._tasks, timeout=seconds) if self._tasks else (set(), set())
        return not late

    async def stop(self) -> None:
        """Ends every stream where it is, as a server does that goes away."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._changed.fire()

    def _find(self, request_id: str) -> ScriptedRequest:
        if request_id not in self.requests:
            raise UnknownRequest(f"no request {request_id!r} is known: it never was, or it finished too long ago")
        return self.requests[request_id]

    async def _run(self, state: ScriptedRequest) -> None:
        while not state.finished:
            if self._delay is not None:
                await self._delay()
            if not state.finished:
                state.committed += 1
                self._changed.fire()
            await asyncio.sleep(0)

    async def _stream(self, state: ScriptedRequest, offsets: list[int]) -> AsyncIterator[Delta]:
        unfinished = set(range(state.request.n))
        while unfinished:
            while not (ready := [delta for c in sorted(unfinished) if (delta := state.delta(c, offsets[c]))]):
                if self._stopped:
                    return
                await self._changed.wait()
            for delta in ready:
                offsets[delta.choice] += len(delta.tokens)
                if delta.finish is not None:
                    unfinished.discard(delta.choice)
                yield delta

    def _record(self, kind: str, message: str, **fields: str | int | float) -> None:
        epoch = self._placement.epoch if self._placement else 0
        self._events.append(FleetEvent(time.time(), kind, epoch, message, fields))
        self._changed.fire()

    def _running(self) -> int:
        return sum(not state.finished for state in self.requests.values())

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
        self._record("switch", f"epoch {epoch}", pause_seconds=0.25)
        return Reconfiguration(
            epoch=epoch,
            before=before,
            after=self._placement,
            bytes_in_place=1 << 20,
            bytes_moved=1 << 19,
            bytes_loaded=0,
            precopy_seconds=0.5,
            pause_seconds=0.25,
            requests_kept=self._running(),
            requests_recomputed=0,
        )

    def _instance(self, name: str) -> InstanceStatus:
        held = self._placement.devices.items() if self._placement else ()
        positions = {device.index: (at.data, at.stage, at.tensor) for at, device in held if device.instance == name}
        return InstanceStatus(name, "scripted", self._states[name], DEVICES_PER_INSTANCE, positions)
