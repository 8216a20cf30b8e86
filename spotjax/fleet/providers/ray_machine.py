"""The actor that is a machine of a Ray cluster: starts the worker on its node, and ends with it.

The worker is a process of its own, so that neither Ray's threads nor its memory are in the way of jax's. What the actor
is to do it reads from the cluster's store, where the controller writes it: nobody has to hold its handle, and an actor
whose machine was given back ends although the controller that did so is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from spotjax.fleet.providers.ray_records import STORE, Wish, fact_key, key_of
from spotjax.settings import OTHER_VARIABLES, PARENT, PREFIX

LOOK_SECONDS = 0.25
"""Between looks at the store and at its node."""


class RayMachine:
    """A machine. Lives until its worker ends, which it is asked to when the machine is given back.

    Runs in the main thread of a process of Ray's, which the worker does not outlive: it is killed with that thread.
    """

    def __init__(self, fleet: str, wish: bytes, program: Sequence[str], patience: float) -> None:
        """Starts the worker.

        Args:
          fleet: whose it is.
          wish: what it is, a ``Wish`` in JSON.
          program: the worker, as arguments of Python; ``{ip}`` is this node's address, ``{notice}`` the notice file.
          patience: seconds from the signal to end until the worker is killed.
        """
        ray: Any = importlib.import_module("ray")
        self._fleet, self._wish, self._patience = fleet, msgspec.json.decode(wish, type=Wish), patience
        self._node = ray.get_runtime_context().get_node_id()
        self._directory = tempfile.TemporaryDirectory(prefix="spotjax-ray-")
        self._notice = Path(self._directory.name) / "notice"
        there = {"{ip}": ray.util.get_node_ip_address(), "{notice}": str(self._notice)}
        arguments = [replaced(argument, there) for argument in program]
        environment = {n: v for n, v in os.environ.items() if not n.startswith(PREFIX) or n in OTHER_VARIABLES}
        self._worker = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment | {PARENT: str(os.getpid())},
        )
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        """Until the worker has ended; then this process ends, and the node is free."""
        killed: float | None = None
        while self._worker.poll() is None:
            try:
                given_back = self._given_back()
                self._tell_drain()
            except Exception as problem:  # the cluster does not answer: the worker goes on
                print(f"spotjax: the cluster does not answer: {problem}", file=sys.stderr, flush=True)
                given_back = False
            if given_back and killed is None:
                killed = time.monotonic() + self._patience
                self._worker.send_signal(signal.SIGTERM)
            if killed is not None and time.monotonic() > killed:
                self._kill()
            time.sleep(LOOK_SECONDS)
        self._kill()
        try:
            self._store().internal_kv_put(self._key("ended"), str(self._worker.returncode).encode(), True, STORE)
        finally:
            self._directory.cleanup()
            os._exit(0)

    def _given_back(self) -> bool:
        """Whether it is to end: it was given back, or nobody knows it any more."""
        wish, released = key_of(self._fleet, self._wish.name).encode(), self._key("released")
        found = self._store().internal_kv_multi_get([wish, released], STORE)
        return released in found or wish not in found or msgspec.json.decode(found[wish], type=Wish) != self._wish

    def _tell_drain(self) -> None:
        """Lets the worker know, once, that this node goes, and in how many seconds."""
        if not self._notice.exists() and (end := self._store().get_draining_nodes().get(self._node)) is not None:
            line = f"preempt {max(0.0, end / 1000 - time.time()):.3f}" if end else "preempt"
            written = self._notice.with_suffix(".new")
            written.write_text(line + "\n")
            written.rename(self._notice)

    def _kill(self) -> None:
        """Ends the worker and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._worker.pid, signal.SIGKILL)

    def _key(self, fact: str) -> bytes:
        return fact_key(self._fleet, self._wish.name, self._wish.life, fact).encode()

    def _store(self) -> Any:
        return importlib.import_module("ray._private.worker").global_worker.gcs_client


def replaced(text: str, values: dict[str, str]) -> str:
    """The text with what differs from node to node."""
    for name, value in values.items():
        text = text.replace(name, value)
    return text
