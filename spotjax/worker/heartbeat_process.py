"""The process that beats for a worker: it imports little, and only sleeps, looks at its parent and sends.

It beats exactly while its parent, the worker, is able to run: not while that is stopped, being traced, dumping core or
on its way out. It ends with its parent, however that died. It outlives the controller and reconnects for ever. What it
sends it is given as bytes, so that it need not load what they are made with. Started by ``worker.heartbeat``.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

import msgspec

from spotjax.errors import ConfigError, TransportError

BEATS_PER_LEASE = 8
PF_EXITING, PF_SIGNALED = 0x4, 0x400
"""Flags in Linux' /proc/<pid>/stat: the process exits; a signal killed it. Both show while it still dumps core or gives
back hundreds of gigabytes, which takes longer than a lease and keeps its connections open."""


class TlsFiles(NamedTuple):
    """Paths of PEM files: this worker's certificate and key, and the authority that signed the controller's."""

    certificate: str
    key: str
    authority: str


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the process is told, as JSON in its only argument.

    Attributes:
      host, port: of the controller's data endpoint.
      instance: for those who look at the list of processes.
      greeting: what a connection begins with, before TLS.
      beat: the frame to send.
      interval: seconds between beats.
      parent: process id of the worker.
      tls: files for mutual TLS; None for plain TCP.
      join_token: file with the fleet's token; empty for none.
    """

    host: str
    port: int
    instance: str
    greeting: bytes
    beat: bytes
    interval: float
    parent: int
    tls: TlsFiles | None
    join_token: str = ""


def main(argument: str) -> NoReturn:
    """The process: beats until its parent is gone."""
    settings = msgspec.json.decode(argument, type=Settings)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group or service; a draining worker goes on beating
    threading.Thread(target=end_with_parent, args=(settings.parent, settings.interval), daemon=True).start()
    beat_for_ever(settings)


def end_with_parent(parent: int, interval: float) -> NoReturn:
    """Ends this process when its standard input is closed, or within ``interval`` seconds of having another parent.

    A thread of its own, because resolving and connecting can block. The pipe alone does not do: a process that the
    worker forked holds it open as well.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], interval)
        if readable and not os.read(0, 4096):
            break
    os._exit(0)


def able_to_run(pid: int) -> bool:
    """Whether the process can do any work, by Linux' /proc; True where that tells nothing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return not halted(file.read())
    except OSError:
        return True


def halted(stat: bytes) -> bool:
    """Whether a /proc/<pid>/stat (see proc_pid_stat(5)) shows a stopped, traced, dying or dead process."""
    fields = stat.rpartition(b")")[2].split()  # the command's name before it may contain anything
    state, flags = fields[0], int(fields[6])
    return state in (b"T", b"t", b"Z", b"X") or bool(flags & (PF_EXITING | PF_SIGNALED))


def beat_for_ever(settings: Settings) -> NoReturn:
    """Connects and beats, again and again; says so when the controller gets out of reach and when it is back."""
    longest = settings.interval * BEATS_PER_LEASE / 2  # a controller that is back hears of us within a lease
    pause, reached = settings.interval, None

    def say(now_reached: bool, line: str) -> None:
        nonlocal reached
        if reached is not now_reached:
            print(line, f"host={settings.host} port={settings.port}", file=sys.stderr, flush=True)
        reached = now_reached

    while True:
        try:
            with connect(settings) as connection:
                while True:
                    if able_to_run(settings.parent) and os.getppid() == settings.parent:
                        connection.settimeout(patience(settings))
                        connection.sendall(settings.beat)
                    wait(connection, settings.interval)
                    say(True, "beating")
                    pause = settings.interval
        except (OSError, ConfigError) as error:
            say(False, f"cannot beat, trying again until it works: {error}")
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, longest)


def connect(settings: Settings) -> socket.socket:
    """A connection to the controller.

    Raises:
      OSError: there is none to be had, or no trust.
      ConfigError: the files for TLS are of no use; they are read anew every time, as certificates are renewed.
    """
    connection = socket.create_connection((settings.host, settings.port), timeout=patience(settings))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # give a dead path up within a lease instead of in a quarter of an hour
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * patience(settings)))
        connection.sendall(settings.greeting)
        if settings.join_token:
            prove(connection, settings)
        if settings.tls is None:
            return connection
        from spotjax.transport.security import Tls  # here, because ssl is a third of this process's memory

        return Tls.from_files(*settings.tls).client.wrap_socket(connection, server_hostname=settings.host)
    except BaseException:
        connection.close()
        raise


def prove(connection: socket.socket, settings: Settings) -> None:
    """Shows the controller that we have the fleet's token, and has it show the same.

    Raises:
      OSError: it has not, or wants none.
      ConfigError: the file is of no use; it is read anew every time.
    """
    from spotjax.transport.join_token import CallerHandshake, JoinToken

    handshake = CallerHandshake(JoinToken.from_file(settings.join_token), settings.greeting)
    connection.sendall(handshake.hello)
    answer = b""
    while len(answer) < handshake.ANSWER:
        more = connection.recv(handshake.ANSWER - len(answer))
        if not more:
            raise ConnectionResetError("the controller closed the connection: is its join token the same?")
        answer += more
    try:
        connection.sendall(handshake.answer(answer))
    except TransportError as error:
        raise ConnectionResetError(str(error)) from error


def wait(connection: socket.socket, seconds: float) -> None:
    """Until the next beat, or until the connection breaks. What the controller sends (its welcome) needs no answer.

    Raises:
      OSError: the connection is gone.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(4096):
                raise ConnectionResetError("the controller closed the connection")
        except TimeoutError as error:
            if error.errno is not None:  # the connection timed out, not this call
                raise


def patience(settings: Settings) -> float:
    """Seconds that connecting or sending may take: a lease, but time enough for a far controller."""
    return max(1.0, settings.interval * BEATS_PER_LEASE)


if __name__ == "__main__":
    main(sys.argv[1])
