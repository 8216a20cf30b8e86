"""A small network on one machine, to cut and to slow down: every host is a network namespace, all on one bridge.

Needs root and the commands ``ip`` and ``ss``. The bridge is in the namespace of whoever makes it, so clients need
nothing special.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

BLOCK = "198.18"
"""Addresses that are set aside for tests of networks (RFC 2544)."""
SLOW = (
    ("netem", "delay", "120ms", "30ms"),
    ("tbf", "rate", "800kbit", "burst", "8kb", "latency", "400ms"),  # a trickle, where the kernel has no netem
)
"""Ways to slow a link down, best first."""


class NetworkUnavailable(Exception):
    """No network of our own can be made here."""


class Network:
    """A bridge with hosts behind it. A context manager: nothing is left of it afterwards.

    Attributes:
      address: of the bridge, where the controller listens.
    """

    def __init__(self) -> None:
        """Makes the bridge.

        Raises:
          NetworkUnavailable: we may not, or cannot.
        """
        self._tag = f"sj{os.getpid() % 100_000}"
        self._subnet = f"{BLOCK}.{os.getpid() % 250 + 1}"
        self.address = f"{self._subnet}.1"
        self._hosts: dict[str, int] = {}
        if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("ss") is None:
            raise NetworkUnavailable("network namespaces need root and the commands ip and ss")
        try:
            _run("ip", "link", "add", self._tag, "type", "bridge")
            _run("ip", "address", "add", f"{self.address}/24", "dev", self._tag)
            _run("ip", "link", "set", self._tag, "up")
            self.host("probe")
        except subprocess.CalledProcessError as error:
            self.close()
            raise NetworkUnavailable(error.stderr.decode().strip()) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str) -> tuple[tuple[str, ...], str]:
        """A namespace for a host, made when it is first asked for: what runs a command in it, and its address."""
        if name not in self._hosts:
            number = self._hosts[name] = len(self._hosts) + 2
            space, link = self._space(name), self._link(name)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", link, "master", self._tag, "up")
            _run("ip", "-n", space, "address", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
        return ("ip", "netns", "exec", self._space(name)), f"{self._subnet}.{self._hosts[name]}"

    def cut(self, name: str) -> None:
        """From now on everything to and from the host vanishes; nobody is told."""
        _run("ip", "link", "set", self._link(name), "down")

    def sever(self, name: str, spare: int) -> None:
        """Resets all connections of the host but those with one port; new ones can be made at once."""
        _run(*self.host(name)[0], "ss", "--no-header", "--tcp", "--kill", f"dport != {spare} and sport != {spare}")

    def mend(self, name: str) -> None:
        """Undoes ``cut`` and ``slow``."""
        _run("ip", "link", "set", self._link(name), "up")
        with contextlib.suppress(subprocess.CalledProcessError):  # it was not slow
            _run("tc", "qdisc", "delete", "dev", self._link(name), "root")

    def slow(self, name: str) -> None:
        """From now on what is sent to the host takes its time.

        Raises:
          NetworkUnavailable: the kernel has no way.
        """
        for discipline in SLOW:
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                _run("tc", "qdisc", "replace", "dev", self._link(name), "root", *discipline)
                return
        raise NetworkUnavailable("the kernel has neither netem nor tbf")

    def close(self) -> None:
        """Takes everything down."""
        for name in self._hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "link", "delete", self._link(name))
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", self._space(name))
        self._hosts.clear()
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", self._tag)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _link(self, name: str) -> str:
        return f"{self._tag}h{self._hosts[name]}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
