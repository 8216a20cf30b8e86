"""A network of namespaces: what is cut is silent, what is mended goes on, nothing is left. Needs root."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from spotjax.tools.namespaces import Network, NetworkUnavailable

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    while data := connection.recv(1 << 16):
        connection.sendall(data)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        network = Network()
    except NetworkUnavailable as problem:
        pytest.skip(str(problem))
    with network:
        yield network


@contextlib.contextmanager
def echo(network: Network, name: str) -> Iterator[socket.socket]:
    """A connection to a server on that host that answers with what it is sent."""
    prefix, address = network.host(name)
    command = [*prefix, sys.executable, "-c", ECHO, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        with socket.create_connection((address, int(server.stdout.readline())), timeout=30) as connection:
            yield connection


def test_a_cut_host_is_silent_and_a_mended_one_goes_on(network: Network) -> None:
    with echo(network, "host") as connection:
        connection.sendall(b"before")
        assert connection.recv(100) == b"before"
        network.cut("host")
        connection.sendall(b"meanwhile")
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        network.mend("host")
        connection.settimeout(30)
        assert connection.recv(100) == b"meanwhile"


def test_a_slow_host_takes_longer_until_it_is_mended(network: Network) -> None:
    with echo(network, "host") as connection:
        network.slow("host")
        begin, content = time.monotonic(), bytes(100_000)
        connection.sendall(content)
        received = 0
        while received < len(content):
            received += len(connection.recv(1 << 20))
        assert time.monotonic() - begin > 0.1
        network.mend("host")


def test_severed_connections_are_reset_but_those_that_are_spared(network: Network) -> None:
    with echo(network, "host") as spared, echo(network, "host") as other:
        network.sever("host", spare=spared.getpeername()[1])
        spared.sendall(b"still here")
        assert spared.recv(100) == b"still here"
        with pytest.raises(ConnectionError):
            other.recv(100)


def test_hosts_reach_each_other(network: Network) -> None:
    prefix, _ = network.host("one")
    _, address = network.host("other")
    script = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('{address}', 9))"
    assert subprocess.run([*prefix, sys.executable, "-c", script], check=False).returncode == 0


def test_nothing_is_left(network: Network) -> None:
    network.host("host")
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    tag = network._tag
    assert tag in links
    network.close()
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert tag not in links and tag not in spaces
