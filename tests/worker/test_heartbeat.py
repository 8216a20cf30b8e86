"""The heartbeat process: beats while its worker can run, whatever that does, and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from beat_receiver import DEADLINE, Receiver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spotjax.protocol.beats import Beat
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.security import Tls
from spotjax.worker import heartbeat_process
from spotjax.worker.heartbeat import Heartbeat
from spotjax.worker.heartbeat_process import TlsFiles, halted

LEASE = 2.0

WORKER = """
import ctypes, os, socket, sys, threading, time
from spotjax.protocol.beats import Beat
from spotjax.transport.framing import Purpose, greeting
from spotjax.transport.sockets import split_address
from spotjax.worker.heartbeat import Heartbeat, frame_of

_, kind, address, interval = sys.argv

def beat_from_a_thread():
    connection = socket.create_connection(split_address(address))
    connection.sendall(greeting(Purpose.MESSAGES, secure=False))
    while True:
        connection.sendall(frame_of(Beat(kind, "a")))
        time.sleep(float(interval))

if kind == "process":
    heartbeat = Heartbeat(address, kind, "a", float(interval))
    heartbeat.start()
    print(heartbeat.pid, flush=True)
else:
    threading.Thread(target=beat_from_a_thread, daemon=True).start()
    print(os.getpid(), flush=True)

while command := sys.stdin.readline().split():
    if command[0] == "hold":  # PyDLL calls C without releasing the GIL
        began = time.monotonic()
        ctypes.PyDLL(None).usleep(int(1e6 * float(command[1])))
        print(time.monotonic() - began, flush=True)
    elif command[0] == "fork" and os.fork() == 0:  # the child holds all pipes of the worker open
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
"""

HOG = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver(LEASE)
    yield receiver
    receiver.close()


@pytest.fixture
def quick() -> Iterator[Receiver]:
    """With a lease for tests in which silence is waited for."""
    receiver = Receiver(0.4)
    yield receiver
    receiver.close()


@pytest.fixture
def busy() -> Iterator[None]:
    """All cores are busy, twice over."""
    hogs = [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


class Worker:
    """A process with a heartbeat, told by lines what to do. Its instance is named by ``kind``: who beats for it."""

    def __init__(self, kind: str, receiver: Receiver) -> None:
        arguments = [kind, receiver.address, str(receiver.leases.seconds / 8)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.heartbeat = int(self.process.stdout.readline())

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def worker_of() -> Iterator[Callable[[str, Receiver], Worker]]:
    workers: list[Worker] = []

    def start(kind: str, receiver: Receiver) -> Worker:
        workers.append(Worker(kind, receiver))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


@contextlib.contextmanager
def beating(receiver: Receiver, incarnation: str = "a", tls: TlsFiles | None = None) -> Iterator[Heartbeat]:
    """A heartbeat process of this very process."""
    heartbeat = Heartbeat(receiver.address, "one", incarnation, receiver.leases.seconds / 8, tls)
    heartbeat.start()
    try:
        yield heartbeat
    finally:
        heartbeat.close()


def ends(watched: int) -> bool:
    """Whether the process behind the pid file descriptor ends in time; a zombie has ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(watched, selectors.EVENT_READ)
        return bool(selector.select(DEADLINE))


@contextlib.contextmanager
def watched(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_holding_the_gil_on_busy_cores_expires_no_lease_where_a_thread_would_miss_it(
    receiver: Receiver, worker_of: Callable[[str, Receiver], Worker], busy: None
) -> None:
    workers = [worker_of(kind, receiver) for kind in ("process", "thread")]
    receiver.hears(2, "process")
    receiver.hears(2, "thread")
    for _ in range(5):  # leases are prolonged while these cores leave the receiver no time; once is enough otherwise
        for worker in workers:
            worker.tell(f"hold {1.25 * LEASE}")
        assert all(float(worker.answer()) > LEASE for worker in workers)
        receiver.hears(1, "process")
        if receiver.lost:
            break
    assert set(receiver.lost) == {"thread"}


def test_a_stopped_worker_is_silent_until_it_goes_on(
    quick: Receiver, worker_of: Callable[[str, Receiver], Worker]
) -> None:
    worker = worker_of("process", quick)
    quick.hears(3, "process")
    worker.process.send_signal(signal.SIGSTOP)
    quick.until(lambda: quick.leases.next_expiry() is None)
    os.kill(worker.heartbeat, 0)  # waits with its worker
    worker.process.send_signal(signal.SIGCONT)
    quick.hears(3, "process")


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child that holds the pipe"])
def test_the_heartbeat_ends_with_a_killed_worker(
    quick: Receiver, worker_of: Callable[[str, Receiver], Worker], forked: bool
) -> None:
    worker = worker_of("process", quick)
    quick.hears(1, "process")
    if forked:
        worker.tell("fork")
        assert worker.answer() == "forked"
    with watched(worker.heartbeat) as heartbeat:
        worker.process.kill()
        assert ends(heartbeat)


def test_the_heartbeat_ends_with_a_worker_that_just_returns(
    quick: Receiver, worker_of: Callable[[str, Receiver], Worker]
) -> None:
    worker = worker_of("process", quick)
    quick.hears(1, "process")
    with watched(worker.heartbeat) as heartbeat:
        worker.process.communicate()
        assert worker.process.returncode == 0
        assert ends(heartbeat)


def test_the_heartbeat_of_a_killed_worker_ends_while_it_cannot_connect(
    worker_of: Callable[[str, Receiver], Worker],
) -> None:
    nobody = Receiver(0.4)
    nobody.close()
    worker = worker_of("process", nobody)
    with watched(worker.heartbeat) as heartbeat:
        worker.process.kill()
        assert ends(heartbeat)


def test_a_heartbeat_process_that_dies_is_replaced(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    with beating(receiver) as heartbeat:
        receiver.hears(1)
        first = heartbeat.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        receiver.until(lambda: heartbeat.pid != first)
        receiver.hears(2)
    assert receiver.lost == []
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the heartbeat process ended; starting another"
    ]


def test_signals_for_the_whole_group_do_not_silence_a_worker_that_drains(receiver: Receiver) -> None:
    with beating(receiver) as heartbeat:
        receiver.hears(1)
        first = heartbeat.pid
        assert first is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(first, number)
        receiver.hears(2)
        assert heartbeat.pid == first


def test_closing_ends_the_process_for_good(receiver: Receiver) -> None:
    with beating(receiver) as heartbeat:
        assert heartbeat.pid is not None
        with watched(heartbeat.pid) as process:
            heartbeat.close()
            assert ends(process)
    with pytest.raises(ProcessLookupError):  # reaped as well
        os.kill(heartbeat.pid, 0)


def test_a_controller_that_comes_back_is_found_and_every_change_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spotjax.worker.heartbeat")

    def said(count: int) -> bool:
        return len(caplog.records) >= count

    first = Receiver(0.4)
    with beating(first):
        first.until(lambda: said(1))
        first.close()
        again = Receiver(0.4, first.port)
        again.hears(3)
        again.until(lambda: said(3))
        again.close()
    lines = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert lines[:3] == [
        f"beating host=127.0.0.1 port={first.port}",
        "cannot beat, trying again until it works",
        lines[0],
    ]


def test_beats_name_instance_and_incarnation(receiver: Receiver) -> None:
    with beating(receiver, "first"), beating(receiver, "second"):
        receiver.hears(1, "one", "first")
        receiver.hears(1, "one", "second")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
async def test_an_endpoint_of_the_transport_hears_the_beats(tmp_path: Path, secure: bool) -> None:
    files = fleet_certificate(tmp_path / "fleet") if secure else None
    heard: asyncio.Queue[object] = asyncio.Queue()
    endpoint = Endpoint(
        Beat, lambda connection, beat, payload: heard.put_nowait(beat), tls=Tls.from_files(*files) if files else None
    )
    heartbeat = Heartbeat(f"127.0.0.1:{await endpoint.listen('127.0.0.1:0')}", "one", "a", 0.05, files)
    heartbeat.start()
    try:
        async with asyncio.timeout(DEADLINE):
            assert [await heard.get() for _ in range(3)] == [Beat("one", "a")] * 3
    finally:
        await asyncio.to_thread(heartbeat.close)
        await endpoint.close()


def fleet_certificate(directory: Path) -> TlsFiles:
    """A fleet of one certificate, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, directory.name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir()
    pem = serialization.Encoding.PEM
    files = TlsFiles(*(str(directory / name) for name in ("certificate.pem", "key.pem", "certificate.pem")))
    Path(files.certificate).write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path(files.key).write_bytes(private)
    return files


def test_beats_go_over_mutual_tls_and_to_no_stranger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spotjax.worker.heartbeat")
    ours, theirs = fleet_certificate(tmp_path / "ours"), fleet_certificate(tmp_path / "theirs")
    receiver = Receiver(LEASE, tls=Tls.from_files(*ours))
    try:
        with beating(receiver, "stranger", theirs):
            receiver.until(lambda: bool(caplog.records))
            assert "CERTIFICATE_VERIFY_FAILED" in caplog.records[0].getMessage()
        with beating(receiver, "friend", ours):
            receiver.hears(2, incarnation="friend")
        assert set(receiver.heard) == {("one", "friend")}
    finally:
        receiver.close()


def test_the_process_imports_nothing_but_the_standard_library_and_msgspec() -> None:
    module = heartbeat_process.__name__
    program = f"import sys; early = set(sys.modules); import {module}; print(*set(sys.modules) - early)"
    imported = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"asyncio", "ssl"} & set(imported)
    beyond = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert beyond - {"typing_extensions"} == {"spotjax", "msgspec"}  # msgspec uses that where it is installed


@pytest.mark.parametrize(
    ("state", "flags", "expected"),
    [
        ("R", 0x400000, False),
        ("S", 0x404100, False),
        ("D", 0x400000, False),
        ("T", 0x400000, True),
        ("t", 0x400000, True),
        ("Z", 0x40840C, True),
        ("D", 0x400400, True),
        ("R", 0x400404, True),
    ],
    ids=["running", "sleeping", "on disk", "stopped", "traced", "zombie", "dumping core", "killed, freeing memory"],
)
def test_a_worker_is_halted_when_it_cannot_work(state: str, flags: int, expected: bool) -> None:
    assert halted(f"7 (a) R (b c) {state} 1 7 7 0 -1 {flags} 5 0 0 0 1 1 0 0 20 0 1 0 9".encode()) is expected


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Heartbeat(address, "one", "a", 0.25)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Heartbeat("127.0.0.1:1", "one", "a", 0.0)
