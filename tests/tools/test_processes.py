"""Processes of a fleet: counted, stopped and ended with everything that they spawned."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from spotjax.tools.processes import PORTS, Process, free_port

TREE = """
import os, socket, subprocess, sys, tempfile
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
held = [socket.socket() for _ in range(3)] + [open(os.devnull) for _ in range(4)]
print('{"message": "started", "time": 1.5}', file=sys.stderr, flush=True)
print(tempfile.gettempdir(), os.environ.get("JAX_PLATFORMS"), file=sys.stderr, flush=True)
child.wait()
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setenv("JAX_PLATFORMS", "none such")
    started = Process("tree", (sys.executable, "-c", TREE), tmp_path)
    until(lambda: len(list(started.records())) == 2 or started.exit_code is not None)
    yield started
    started.kill()


def test_a_process_and_its_child_are_counted(process: Process) -> None:
    usage = process.usage()
    assert usage.processes == 2 and usage.sockets == 3 and usage.files >= 10
    assert usage.threads >= 2 and usage.memory > 2**20


def test_both_are_stopped_or_the_process_alone(process: Process) -> None:
    parent, child = process.tree()
    process.signal(signal.SIGSTOP, whole=False)
    until(lambda: parent.status() == psutil.STATUS_STOPPED)
    assert child.status() != psutil.STATUS_STOPPED
    process.signal(signal.SIGSTOP)
    until(lambda: child.status() == psutil.STATUS_STOPPED)
    process.signal(signal.SIGCONT)
    until(lambda: psutil.STATUS_STOPPED not in (parent.status(), child.status()))


def test_nothing_lives_after_a_kill_even_if_stopped(process: Process) -> None:
    process.tree()
    process.signal(signal.SIGSTOP)
    process.kill()
    until(lambda: process.tree() == [])
    assert process.exit_code == -signal.SIGKILL


def test_a_child_that_outlives_its_parent_is_found(process: Process) -> None:
    _, child = process.tree()
    child.suspend()  # else it ends when its standard input does
    process.signal(signal.SIGKILL, whole=False)
    process.wait(30)
    assert process.tree() == [child]


def test_its_log_is_read_and_its_environment_is_its_own(process: Process, tmp_path: Path) -> None:
    assert list(process.records()) == [
        {"message": "started", "time": 1.5},
        {"message": f"{tmp_path / 'temporary'} cpu"},
    ]


def test_a_free_port_can_be_listened_on_and_is_not_given_to_connections() -> None:
    port = free_port("127.0.0.1")
    assert port in PORTS
    with socket.create_server(("127.0.0.1", port)):
        assert all(free_port("127.0.0.1") != port for _ in range(20))
