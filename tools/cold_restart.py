"""Starts a service again from its commit log: ``python -m spotjax.tools.cold_restart``, or ``spotjax cold-restart``.

Here: what will be restored, by the log, the newest save of KV and the planner; and how far that is, once the server
runs. Serving itself is that of ``spotjax serve``. What is shown has ids and lengths of requests, never what they say.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from spotjax import cli
from spotjax.checkpoint.saves import Save
from spotjax.config import ServeConfig, mode
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.generation import Delta
from spotjax.engine.log_inspection import LogSummary, RequestSummary
from spotjax.fleet.change import plan_change
from spotjax.fleet.service import Service
from spotjax.local_workers import name_of
from spotjax.meshes.instance import Instance
from spotjax.meshes.instance_types import VIRTUAL_CPU, parse_instances
from spotjax.meshes.placement import Placement
from spotjax.models.spec import ModelSpec
from spotjax.sizing import planning_for, resolve_dtype, resolve_limits, virtual_memory

Say = Callable[[str], None]
"""Is told a line for people."""
SAY_SECONDS = 1.0
"""Between lines that say how many requests go on."""


@dataclass(frozen=True)
class RestoredRequest:
    """What becomes of an unfinished request.

    Attributes:
      request_id: of the request.
      prompt_tokens: length of the prompt.
      tokens: output tokens of each choice so far.
      resumable: goes on; otherwise it ends, since its client cannot come back.
      kv_positions: of all its sequences that have not ended: positions whose KV a save has, at most.
      recomputed_positions: those whose KV is computed again, at least.
    """

    request_id: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    resumable: bool
    kv_positions: int
    recomputed_positions: int


@dataclass(frozen=True)
class PlannedMesh:
    """The mesh for the instances that there are.

    Attributes:
      placement: the mesh.
      loaded: bytes of parameters that each of its instances reads from the checkpoint.
      received: bytes that each of them gets from others.
      idle: instances that are not needed.
    """

    placement: Placement
    loaded: Mapping[str, int]
    received: Mapping[str, int]
    idle: tuple[str, ...]


@dataclass(frozen=True)
class Restoration:
    """All that a cold restart would do.

    Attributes:
      service, epoch: of the log.
      model: name of what is served.
      user: process that writes the log now, empty if none does.
      unfinished: in order of acceptance.
      finished: requests that can still be read to their end.
      save: directory of the save of KV that is used, empty if none is.
      damage: what is wrong with the log, a line each.
      mesh: None if it is not known which instances will come.
    """

    service: str
    epoch: int
    model: str
    user: str
    unfinished: tuple[RestoredRequest, ...]
    finished: int
    save: str
    damage: tuple[str, ...]
    mesh: PlannedMesh | None

    @property
    def going_on(self) -> int:
        """Requests that go on."""
        return sum(request.resumable for request in self.unfinished)

    @property
    def with_kv(self) -> int:
        """Requests that go on with KV from the save."""
        return sum(request.kv_positions > 0 for request in self.unfinished)

    @property
    def kv_positions(self) -> int:
        """Positions whose KV the save has, at most."""
        return sum(request.kv_positions for request in self.unfinished)

    @property
    def recomputed_positions(self) -> int:
        """Positions whose KV is computed again, at least."""
        return sum(request.recomputed_positions for request in self.unfinished)


def restoration(log: LogSummary, model: str, user: str, save: Save | None, mesh: PlannedMesh | None) -> Restoration:
    """What becomes of a log with a save of its service."""
    kept = save.sequences if save is not None else {}
    unfinished = tuple(_restored(request, kept) for request in log.requests if request.unfinished)
    finished, path = len(log.requests) - len(unfinished), save.path if save is not None else ""
    return Restoration(log.identity, log.epoch, model, user, unfinished, finished, path, log.damage, mesh)


def _restored(request: RequestSummary, kept: Mapping[int, int]) -> RestoredRequest:
    kv = recomputed = 0
    for choice, tokens in enumerate(request.tokens if request.resumable else ()):
        if not request.ended[choice]:
            needed = request.prompt_tokens + tokens - 1  # that of the last token is computed to get the next
            here = kept.get(request.key + choice, 0)
            here = here if here <= needed else 0  # the log has lost its end: that KV may be of other tokens
            kv, recomputed = kv + here, recomputed + needed - here
    return RestoredRequest(request.request_id, request.prompt_tokens, request.tokens, request.resumable, kv, recomputed)


def plan_mesh(config: ServeConfig, model: ModelSpec, assumed: str, epoch: int) -> PlannedMesh | None:
    """The mesh that would be formed, by the code that forms it; None where workers are waited for.

    Without ``assumed``, instances of this machine are taken as virtual ones: what accelerators it has, only jax knows.

    Args:
      config: of the server.
      model: as its checkpoint describes it.
      assumed: instances to plan for, such as ``4xg5.12xlarge``; empty: those that the settings name.
      epoch: of the mesh.

    Raises:
      ConfigError: settings do not go together, or the instances are no known ones.
      NoFeasibleShape: no mesh fits.
    """
    count = config.workers if mode(config) == "controller" else config.embedded_instances
    if not (assumed or count):
        return None
    dtype = resolve_dtype(config.dtype, "any accelerator" if assumed else "cpu")
    spec = ModelSpec(model.config, dtype_bytes=dtype.itemsize)
    limits, _ = resolve_limits(config, spec)
    if assumed:
        instances = parse_instances(assumed)
    else:
        each = config.devices_per_instance
        memory = config.instance_memory_bytes // each or virtual_memory(spec, limits, count * each)
        kind = replace(VIRTUAL_CPU, devices=each, memory_bytes=memory)
        instances = tuple(Instance(name_of(number), kind) for number in range(count))
    preparation = plan_change(planning_for(config, spec, limits), None, instances, {}, epoch)
    placement = preparation.placement
    used = sorted({device.instance for device in placement.devices.values()}, key=[i.name for i in instances].index)
    loaded, received = dict.fromkeys(used, 0), dict.fromkeys(used, 0)
    for transfer in preparation.plan.transfers:
        (loaded if transfer.source is None else received)[transfer.target.instance] += transfer.bytes
    return PlannedMesh(placement, loaded, received, tuple(i.name for i in instances if i.name not in used))


def salvage(directory: Path, model: str) -> tuple[str, ...]:
    """Replaces a damaged log by one with all that is intact. Returns what was damaged, a line each.

    Args:
      directory: of the log.
      model: fingerprint of what it serves.

    Raises:
      CommitLogError: it is in use, or nothing of it can be read.
    """

    async def replaced() -> tuple[str, ...]:
        log = await asyncio.to_thread(DurableLog.open, directory, "step", model, salvage=True)
        await log.close()
        return log.salvaged

    return asyncio.run(replaced())


async def follow(service: Service, unfinished: Sequence[RequestSummary], started: float, say: Say) -> None:
    """Says how many requests go on until all do; for the event loop of the server.

    Args:
      service: that has just begun to serve.
      unfinished: as the log had them.
      started: monotonic seconds at which the restart began.
      say: is told.
    """
    if not unfinished:
        say("restored: nothing was unfinished")
        return
    first_tokens: list[float] = []
    ended = 0

    async def gone_on(request: RequestSummary) -> None:
        nonlocal ended
        deltas = cast(AsyncGenerator[Delta], service.stream(request.request_id, request.tokens))
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.tokens:
                    first_tokens.append(time.monotonic() - started)
                    return
        ended += 1  # without another token: cancelled, or it had been about to end

    def so_far() -> str:
        others = f", {ended} ended" if ended else ""
        return f"restored: {len(first_tokens)} of {len(unfinished)} requests go on{others}"

    waiting = {asyncio.create_task(gone_on(request)) for request in unfinished}
    try:
        said = ""
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=SAY_SECONDS)
            for task in done:
                task.result()
            if waiting and so_far() != said:
                said = so_far()
                say(said)
    finally:
        for task in waiting:
            task.cancel()
    after = f", first token after {min(first_tokens):.1f} s" if first_tokens else ""
    kept = _kept(service)
    say(f"{so_far()}, {kept} sequence{'s' * (kept != 1)} with KV{after}")


def _kept(service: Service) -> int:
    """Sequences that the first mesh took over with their KV."""
    switches = (event for event in service.recent() if event.kind == "switch")
    return next((int(event.fields["kept"]) for event in switches), 0)


def main() -> int:
    """``spotjax cold-restart`` with the same arguments; returns the exit code."""
    return cli.main(["cold-restart", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
