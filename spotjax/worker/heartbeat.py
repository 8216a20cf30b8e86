"""Tells the controller that a worker is alive, from a small process of its own.

A worker compiles for minutes on all cores and holds the GIL in C code for seconds; a thread of it could not promise a
beat every quarter of a second. Here is what the worker does about that process, ``worker.heartbeat_process``: start it,
pass on what it says, replace it when it ends. Leases are not counted here (``fleet.leases``), and a beat says nothing
about what the worker does.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

import msgspec

from spotjax.protocol.beats import Beat
from spotjax.transport.framing import Limits, Purpose, frame_start, greeting
from spotjax.transport.sockets import split_address
from spotjax.worker import heartbeat_process
from spotjax.worker.heartbeat_process import BEATS_PER_LEASE, Settings, TlsFiles

log = logging.getLogger("spotjax.worker.heartbeat")

CLOSING_SECONDS = 5.0
"""How long the process may take to end by itself before it is killed."""
LASTING_SECONDS = 10.0
"""A process that ran this long and ended is replaced without delay."""


class Heartbeat:
    """The heartbeat process of this worker, replaced whenever it ends before ``close``."""

    def __init__(
        self,
        controller: str,
        instance: str,
        incarnation: str,
        interval: float,
        tls: TlsFiles | None = None,
        join_token: str = "",
    ) -> None:
        """Prepares only.

        Args:
          controller: HOST:PORT of the controller's data endpoint.
          instance, incarnation: what the beats say.
          interval: seconds between beats; the lease is BEATS_PER_LEASE times as long.
          tls: files for mutual TLS; None for plain TCP.
          join_token: file with the fleet's token; empty for none.

        Raises:
          ValueError: the address or the interval is none.
        """
        if not interval > 0:
            raise ValueError(f"a beat every {interval} s: give a positive interval in seconds")
        host, port = split_address(controller)
        self._settings = Settings(
            host=host,
            port=port,
            instance=instance,
            greeting=greeting(Purpose.MESSAGES, secure=tls is not None, proven=bool(join_token)),
            beat=frame_of(Beat(instance, incarnation)),
            interval=interval,
            parent=os.getpid(),
            tls=tls,
            join_token=join_token,
        )
        self._process: subprocess.Popen[str] | None = None
        self._supervisor: threading.Thread | None = None
        self._spawning = threading.Lock()
        self._closing = threading.Event()

    @property
    def pid(self) -> int | None:
        """Of the latest process; None before ``start``."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process and watches over it.

        Raises:
          OSError: the operating system gives no process.
        """
        self._supervisor = threading.Thread(
            target=self._supervise, args=(self._spawn(),), name="heartbeat", daemon=True
        )
        self._supervisor.start()

    def close(self) -> None:
        """Ends the process; returns when it is gone."""
        with self._spawning:
            self._closing.set()
        if self._process is None or self._supervisor is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._supervisor.join(CLOSING_SECONDS)
        self._process.kill()
        self._supervisor.join()

    def _spawn(self) -> subprocess.Popen[str] | None:
        """Another process; None once closing."""
        with self._spawning:
            if self._closing.is_set():
                return None
            # Its standard input is a pipe from here: it closes when this process dies, whatever the cause.
            self._process = subprocess.Popen(
                [sys.executable, "-m", heartbeat_process.__name__, msgspec.json.encode(self._settings).decode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            return self._process

    def _supervise(self, process: subprocess.Popen[str] | None) -> None:
        """Passes on what the process says; replaces it when it ends, more slowly while none lasts."""
        pause = 0.0
        while process is not None:
            began = time.monotonic()
            with process:
                assert process.stderr is not None
                for line in process.stderr:
                    log.info("%s", line.rstrip())
            if self._closing.is_set():
                return
            log.warning("the heartbeat process ended; starting another", extra={"exit_code": process.returncode})
            pause = 0.0 if time.monotonic() - began > LASTING_SECONDS else self._longer(pause)
            process = self._replacement(pause)

    def _replacement(self, pause: float) -> subprocess.Popen[str] | None:
        """Tries until there is another process; None once closing."""
        while not self._closing.wait(pause):
            try:
                return self._spawn()
            except OSError as error:
                log.error("no heartbeat process can be started", extra={"error": str(error)})
                pause = self._longer(pause)
        return None

    def _longer(self, pause: float) -> float:
        interval = self._settings.interval
        return min(max(2 * pause, interval), 2 * BEATS_PER_LEASE * interval)


def frame_of(beat: Beat) -> bytes:
    """The beat as it goes over the wire."""
    return frame_start(msgspec.msgpack.encode(beat), 0, Limits())
