"""The join token: proofs are those of the standard, and nobody without the token is talked to."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_cases import Authority, Net, Step

from spotjax.errors import ConfigError, ConnectionLost, TransportError
from spotjax.transport.framing import Purpose, greeting
from spotjax.transport.join_token import CalledHandshake, CallerHandshake, JoinToken

OURS, THEIRS = JoinToken("sjx-join-" + "a" * 43), JoinToken("sjx-join-" + "b" * 43)
PURPOSE = greeting(Purpose.MESSAGES, False, True)


def test_both_sides_of_a_handshake_believe_each_other_if_they_have_the_same_token() -> None:
    caller, called = CallerHandshake(OURS, PURPOSE), CalledHandshake(OURS, PURPOSE)
    called.require(caller.answer(called.answer(caller.hello)))


def test_whoever_has_another_token_or_purpose_is_found_out_by_either_side() -> None:
    for token, purpose in ((THEIRS, PURPOSE), (OURS, greeting(Purpose.BULK, False, True))):
        caller, called = CallerHandshake(OURS, PURPOSE), CalledHandshake(token, purpose)
        with pytest.raises(TransportError, match="another join token"):
            caller.answer(called.answer(caller.hello))
        with pytest.raises(TransportError, match="another join token"):
            called.require(OURS.proof("caller", PURPOSE, caller.hello, b"x" * 32))


def test_a_proof_that_was_heard_is_of_no_use_again_and_not_for_the_other_side() -> None:
    caller, called = CallerHandshake(OURS, PURPOSE), CalledHandshake(OURS, PURPOSE)
    answer = called.answer(caller.hello)
    proof = caller.answer(answer)
    with pytest.raises(TransportError):
        another = CalledHandshake(OURS, PURPOSE)
        another.answer(caller.hello)
        another.require(proof)
    with pytest.raises(TransportError):
        called.require(answer[32:])


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_proof_is_an_hmac_of_all_that_was_said(first: bytes, second: bytes) -> None:
    key = hashlib.sha256(b"spotjax join token\0sjx-join-" + b"a" * 43).digest()
    said = b"".join(len(part).to_bytes(4, "big") + part for part in (b"proof", b"caller", PURPOSE, first, second))
    assert OURS.proof("caller", PURPOSE, first, second) == hmac.new(key, said, hashlib.sha256).digest()


def test_a_token_that_a_person_made_up_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("swordfish\n")
    with pytest.raises(ConfigError, match="9 characters"):
        JoinToken.from_file(tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be read"):
        JoinToken.from_file(tmp_path / "none")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
async def test_messages_and_bulk_reads_go_between_those_who_share_a_token(
    net: Net, authority: Authority, secure: bool
) -> None:
    tls = authority.tls() if secure else None
    address, inbox = await net.listening(token=OURS, tls=tls, provide=lambda what: [what * 2])
    us = net.endpoint(token=OURS, tls=tls).endpoint
    connection = await us.connect(address, 5)
    connection.send(Step(1, "decode"), b"payload")
    assert (await inbox.next())[1] == Step(1, "decode")
    into = bytearray(6)
    await us.fetch(address, b"abc", memoryview(into), 5)
    assert into == b"abcabc"


@pytest.mark.parametrize("token", [None, THEIRS], ids=["none", "another"])
async def test_nobody_else_is_heard_or_answered(
    net: Net, caplog: pytest.LogCaptureFixture, token: JoinToken | None
) -> None:
    read: list[bytes] = []
    address, inbox = await net.listening(token=OURS, provide=lambda what: read.append(what) or [what])  # type: ignore[func-returns-value]
    stranger = net.endpoint(token=token).endpoint
    for refused in (stranger.connect(address, 5), stranger.fetch(address, b"secret", memoryview(bytearray(6)), 5)):
        with pytest.raises(ConnectionLost, match="join token" if token else "closed|broke"):
            await refused
    assert not read and inbox.frames.empty()
    assert "refused: it " in caplog.text


async def test_a_side_without_a_token_does_not_take_one_that_has(net: Net) -> None:
    address, _ = await net.listening()
    with pytest.raises(ConnectionLost, match="join token"):
        await net.endpoint(token=OURS).endpoint.connect(address, 5)


@pytest.mark.parametrize("sent", [b"", b"x" * 32, b"x" * 64], ids=["nothing", "a number", "a wrong proof"])
async def test_a_stranger_that_goes_only_part_of_the_way_gets_nothing(net: Net, sent: bytes) -> None:
    address, _ = await net.listening(token=OURS)
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        sock.sendall(PURPOSE + sent)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(10)
        got = b""
        while more := await asyncio.to_thread(sock.recv, 4096):
            got += more
        assert len(got) == (64 if len(sent) >= 32 else 0)  # number and proof of the other side, and no welcome
