"""One host's part of a worker that is a TPU slice: the same commands as any worker's, on this host's devices.

Steps and commands have one order on all hosts. A command that changes what steps find waits at its place in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice
from spotjax.protocol import control, reads
from spotjax.worker.slice_executor import Gate, SliceExecutor
from spotjax.worker.slice_messages import ReadHeads, decode_read
from spotjax.worker.slice_peers import SlicePeers
from spotjax.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Buffer


class SliceWorker(Worker):
    """One host's model; see ``Worker``."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        peers, executor = cast(SlicePeers, self._peers), cast(SliceExecutor, self.executor)
        peers.host, peers.executor = self._host, executor
        self._slice_peers, self._slice_executor = peers, executor

    @classmethod
    def store_name(cls, name: str) -> str:
        """Hosts of one machine must not share a store."""
        return f"{name}/host-{jax.process_index()}" if jax.process_index() else name

    def turn(self, command: control.Command) -> Gate | None:
        """Gives a command its place in the order; None if it needs none. To be called when it is sent or received."""
        if isinstance(command, control.Clear):
            self.executor.release()  # whoever was to send masks for steps before it may be gone
        if isinstance(command, control.CopyPages | control.Switch | control.Adopt | control.Clear):
            return self._slice_executor.gate()
        return None

    async def carry_out_at(self, gate: Gate | None, command: control.Command) -> control.Done:
        """Carries out a command at its place in the order. Steps go on while pages move, else they wait.

        Raises: see ``carry_out``.
        """
        if gate is None:
            return await super().carry_out(command)
        try:
            await gate.reached()
            if isinstance(command, control.CopyPages | control.Switch):
                gate.open()
            if isinstance(command, control.Clear):
                await asyncio.to_thread(Worker.clear, self)
                return control.Done(command.id)
            return await super().carry_out(command)
        finally:
            gate.open()

    def close(self, *, for_good: bool) -> None:
        """See ``Worker.close``."""
        super().close(for_good=for_good)
        self._slice_executor.end()

    def provide(self, what: bytes) -> Sequence[Buffer]:
        """Answers a bulk read of another host, or of another worker, by what all hosts have.

        Raises:
          SliceUnavailable: it is not here.
          TransportError: another host does not answer.
        """
        wanted = decode_read(what)
        peers, hosts = self._slice_peers, self._slice_peers.hosts
        if isinstance(wanted, reads.ReadSlice) and hosts.of(wanted.device) != hosts.number:
            shape = tuple(stop - start for start, stop in wanted.index)
            content = np.empty(shape, self._host.model.parameter_dtype(wanted.name))
            peers.read_slice(DeviceRef(self._name, wanted.device), ArraySlice(wanted.name, wanted.index), content)
            return [content.reshape(-1).view(np.uint8).data]
        if not isinstance(wanted, reads.ReadPages | ReadHeads):
            return super().provide(what)
        placement = self._host.placement
        if placement is None or placement.epoch != wanted.epoch:
            raise SliceUnavailable(f"KV of epoch {wanted.epoch} is not here any more")
        if isinstance(wanted, ReadHeads):
            return [peers.own_heads(wanted.replica, wanted.layers, wanted.pages, wanted.heads).data]
        whole, _ = self._host.kv.host_pages(wanted.layers[1] - wanted.layers[0], len(wanted.pages))
        peers.read_pages(self._name, wanted.replica, wanted.layers, wanted.pages, whole)
        return [whole.data]
