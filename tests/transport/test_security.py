"""With TLS only processes with a certificate of the authority talk to each other; without, nothing else is spoken."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import numpy as np
import pytest
from transport_cases import Authority, Net, Step

from spotjax.errors import ConfigError, ConnectionLost
from spotjax.transport.bulk import CHUNK
from spotjax.transport.memory import aligned
from spotjax.transport.security import Tls

DATA = np.random.default_rng(0).bytes(3 * CHUNK + 77)


def provide(what: bytes) -> list[bytes]:
    return [DATA[:5], DATA[5:]]


async def test_members_of_the_fleet_exchange_messages_and_bulk(net: Net, authority: Authority) -> None:
    address, server = await net.listening(provide=provide, tls=authority.tls())
    client = net.endpoint(tls=authority.tls())
    connection = await client.endpoint.connect(address, 5)
    connection.send(Step(1), DATA)
    back, header, payload = await server.next()
    assert header == Step(1) and payload == DATA
    back.send(Step(2), b"x")
    assert (await client.next())[1] == Step(2)
    for _ in range(2):
        into = aligned(len(DATA))
        await client.endpoint.fetch(address, b"", into, 5)
        assert into == DATA


async def test_a_read_under_tls_goes_on_after_a_cut(net: Net, authority: Authority) -> None:
    address, _ = await net.listening(provide=provide, tls=authority.tls())
    through = net.proxy(address, lambda number, position, data: None if not number and position > CHUNK else data)
    into = aligned(len(DATA))
    await net.endpoint(tls=authority.tls()).endpoint.fetch(through.address, b"", into, 5)
    assert into == DATA
    assert through.connections == 2


@pytest.fixture(params=["plaintext", "foreign certificate", "expired certificate", "no certificate"])
def intruder(request: pytest.FixtureRequest, authority: Authority, stranger: Authority) -> Tls | None:
    """What a process brings that is not to be talked to."""
    match request.param:
        case "plaintext":
            return None
        case "foreign certificate":
            return stranger.tls(trusts=authority)
        case "expired certificate":
            return authority.tls(days=-1)
        case _:
            bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            bare.check_hostname = False
            bare.load_verify_locations(authority.file)
            return Tls(server=bare, client=bare)


@pytest.mark.parametrize("way", ["connect", "fetch"])
async def test_callers_that_do_not_belong_are_refused_with_a_log_line(
    net: Net, authority: Authority, intruder: Tls | None, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    address, server = await net.listening(provide=provide, tls=authority.tls())
    client = net.endpoint(tls=intruder).endpoint
    with caplog.at_level(logging.WARNING, "spotjax.transport"), pytest.raises(ConnectionLost):
        if way == "connect":
            await client.connect(address, 5)
        else:
            await client.fetch(address, b"", aligned(len(DATA)), 5)
    assert "refused" in caplog.text
    assert server.frames.empty()


@pytest.mark.parametrize("way", ["connect", "fetch"])
@pytest.mark.parametrize("serves", ["plaintext", "foreign certificate", "expired certificate"])
async def test_callers_refuse_servers_that_do_not_belong(
    net: Net, authority: Authority, stranger: Authority, serves: str, way: str
) -> None:
    tls = {
        "plaintext": None,
        "foreign certificate": stranger.tls(trusts=authority),
        "expired certificate": authority.tls(days=-1),
    }[serves]
    address, server = await net.listening(provide=provide, tls=tls)
    client = net.endpoint(tls=authority.tls()).endpoint
    with pytest.raises(ConnectionLost):
        if way == "connect":
            await client.connect(address, 5)
        else:
            await client.fetch(address, b"", aligned(len(DATA)), 5)
    assert server.frames.empty()


async def test_nothing_older_than_tls_1_3_is_spoken(net: Net, authority: Authority) -> None:
    old = authority.tls()
    old.client.minimum_version = ssl.TLSVersion.TLSv1_2
    old.client.maximum_version = ssl.TLSVersion.TLSv1_2
    address, _ = await net.listening(tls=authority.tls())
    with pytest.raises(ConnectionLost):
        await net.endpoint(tls=old).endpoint.connect(address, 5)


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.files()
    other_key = authority.files()[1]
    missing = tmp_path / "missing.pem"
    for files, named in [
        ((missing, key, authority.file), "missing.pem"),
        ((certificate, other_key, authority.file), certificate.name),
        ((certificate, key, missing), "authority .*missing.pem"),
    ]:
        with pytest.raises(ConfigError, match=named):
            Tls.from_files(*files)
