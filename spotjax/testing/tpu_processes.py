"""Processes of this machine that stand for the hosts of TPU nodes: started with a node, killed when it is taken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process

from google.cloud.tpu_v2 import Node

from spotjax.testing.tpu_cloud import TpuCloud


class NodeProcesses:
    """One shell command for each node that is ready.

    It finds the node's metadata in its environment, upper case and with underscores: ``NODE_NAME`` is that of
    ``spotjax-name``, for one.

    Args:
      command: the command; if empty, nodes have no processes.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._processes: dict[str, Process] = {}

    async def follow(self, cloud: TpuCloud) -> None:
        """Starts and kills what changes of the nodes ask for."""
        ready = {name: node for name, node in cloud.nodes.items() if node.state == Node.State.READY}
        for name in [name for name in self._processes if name not in ready]:
            await _kill(self._processes.pop(name))
        for name in ready if self._command else ():
            if name not in self._processes:
                self._processes[name] = await self._start(ready[name])

    async def close(self) -> None:
        """Kills all of them."""
        for process in self._processes.values():
            await _kill(process)

    async def _start(self, node: Node) -> Process:
        told = {f"node-{key.removeprefix('spotjax-')}": value for key, value in node.metadata.items()}
        upper = {key.upper().replace("-", "_"): value for key, value in told.items()}
        return await asyncio.create_subprocess_shell(
            self._command, env={**os.environ, **upper}, start_new_session=True, stdin=asyncio.subprocess.DEVNULL
        )


async def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
