"""Inputs that nobody should send: valid ones that were damaged, and bytes at random. Every input follows from its name.

Parts that need no server are here too, each a function of one input that raises what is a bug.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random

import msgspec
from google.protobuf.message import DecodeError

from spotjax.api.access.key_file import KeyRecord, hash_of, parse_keys, written
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.unknown_fields import refuse_unknown_fields
from spotjax.api.validation import ServedModel, accepted_request
from spotjax.errors import InvalidRequest, TransportError
from spotjax.meshes.instance import InstanceType
from spotjax.protocol import control, reads
from spotjax.protocol.beats import Beat
from spotjax.protocol.steps import ResultHeader, StepHeader
from spotjax.testing.scripted_service import ByteTokenizer
from spotjax.transport import bulk
from spotjax.transport.decoding import UNREADABLE, decoder_of
from spotjax.transport.framing import FrameReader, Limits, frame_start, read_greeting

MODEL = ServedModel("scripted", ByteTokenizer(), max_model_len=256)
EDGES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")
KIND = InstanceType("box", 2, 2**30, 1e9, 1e9, 1e9, 1e9)


def damaged(draw: Random, valid: bytes) -> bytes:
    """A valid input with a few places changed, or, now and then, bytes at random."""
    if draw.random() < 0.1:
        return draw.randbytes(draw.randrange(200))
    content = bytearray(valid)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(content) + 1)
        match draw.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << draw.randrange(8)
            case 1:
                content[at:at] = draw.choice(EDGES)
            case 2:
                del content[at : at + draw.randrange(1, 9)]
            case 3:
                content[at:at] = content[max(0, at - draw.randrange(1, 40)) : at]
            case 4:
                content[at : at + 8] = draw.randbytes(8)
            case _:
                del content[at:]
    return bytes(content)


# -- frames of the data plane


def frame(draw: Random) -> bytes:
    """A whole frame, of one of the headers that a worker or a controller takes."""
    header = draw.choice((Beat("instance-0", "a" * 32), draw.choice((["StepHeader"], {"a": 1}, 7, None))))
    payload = draw.randbytes(draw.choice((0, 1, 100, 5000)))
    return frame_start(msgspec.msgpack.encode(header), len(payload), Limits()) + payload


decode_header = decoder_of(Beat | StepHeader | ResultHeader)


def try_frames(draw: Random) -> bool:
    """Cuts a damaged stream into frames, however it is split. Returns whether all of it was taken."""
    content = damaged(draw, b"".join(frame(draw) for _ in range(draw.randrange(1, 4))))

    def deliver(header: bytes, payload: memoryview) -> None:
        decode_header(header)

    reader = FrameReader(deliver, Limits())
    try:
        read_greeting(damaged(draw, b"SJ\x01\x41")[:4].ljust(4, b"\0"))
        while content:
            into = reader.buffer()
            piece = content[: min(len(into), draw.randrange(1, 4000))]
            into[: len(piece)] = piece
            reader.advance(len(piece))
            content = content[len(piece) :]
    except (TransportError, msgspec.MsgspecError):
        return False
    return True


def try_bulk(draw: Random) -> bool:
    """What a reader and a provider of bulk reads decode."""
    slice_of = reads.encode(reads.ReadSlice(0, "layers.0.wq", ((0, 4), (0, 8))))
    backup = reads.encode(reads.ReadBackup((0, 2), ((1, 2), (3, 4))))
    taken = 0
    for valid, decode in (
        (bulk.encoder.encode(bulk.Read(slice_of, 0, 100)), bulk.decoder.decode),
        (draw.choice((slice_of, backup)), reads.decode),
    ):
        with contextlib.suppress(*UNREADABLE):
            decode(damaged(draw, valid))
            taken += 1
    return taken == 2


# -- the control stream


def try_control(draw: Random) -> bool:
    """Messages of workers and of controllers."""
    register = control.Register(control.VERSION, "a", "1", KIND, "cpu", False, "", "127.0.0.1:1")
    from_worker = (register, control.Proof(b"x" * 32), control.Noticed("gce", "preempt", 3.0, "TRUE"))
    setup = control.ModelSetup("tiny", "print", "float32", 33, 8, 64, 4, 16, (1, 2))
    from_controller = (
        control.Welcome(setup, 1, 1.0, "s", 0, reunion=False),
        control.Coverage(1, (0, 4), (1, 2)),
        control.Forget((1,)),
    )
    decode, valid = draw.choice(
        (
            (control.decode_from_worker, draw.choice(from_worker)),
            (control.decode_from_controller, draw.choice(from_controller)),
        )
    )
    deep = draw.random() < 0.01
    try:
        decode(b"\x91" * 20_000 if deep else damaged(draw, control.encode(valid)))
    except msgspec.MsgspecError:
        return False
    return True


# -- requests


def request(draw: Random) -> pb.GenerateRequest:
    """A request whose fields are what they may be, but for a few."""
    number = draw.choice((-1.0, 2.0, 1e308, float("inf"), float("nan")))
    asked = pb.GenerateRequest(resumable=draw.random() < 0.5, sampling=pb.Sampling(max_tokens=4, seed=1))
    sampling = asked.sampling
    match draw.randrange(3):
        case 0:
            asked.text = draw.choice(("hello", "\U0001f600" * draw.randrange(1, 40), "\0", ""))
        case 1:
            asked.token_ids.ids.extend(draw.choice(([1, 2], [5] * 100, [2**32 - 1], [1] * 300, [])))
        case _:
            for _ in range(draw.randrange(1, 3)):
                asked.chat.messages.add(role=draw.choice((pb.ChatMessage.ROLE_USER, 2, 77)), content="x")
    for _ in range(draw.randrange(3)):
        match draw.randrange(9):
            case 0:
                sampling.max_tokens = draw.choice((1, 0, 2**32 - 1))
            case 1:
                sampling.temperature = draw.choice((0.0, 1.0, number))
            case 2:
                sampling.top_p = draw.choice((0.5, 0.0, number))
            case 3:
                sampling.stop.extend(draw.choice((["x"], [""], ["\0"] * 20)))
            case 4:
                sampling.logit_bias[draw.choice((5, 2**31))] = draw.choice((1.0, number))
            case 5:
                sampling.top_k = draw.choice((5, 2**32 - 1))
            case 6:
                asked.request_id = draw.choice(("a", "", "a" * 65, "../x", "\n"))
            case 7:
                asked.n = draw.choice((1, 16, 0, 17, 2**32 - 1))
            case _:
                asked.model = draw.choice(("scripted", "another", ""))
    return asked


async def try_request(draw: Random) -> bool:
    """A request in protobuf, as it is or damaged, as the server checks it."""
    content = request(draw).SerializeToString()
    if draw.random() < 0.6:
        content = damaged(draw, content)
    try:
        asked = pb.GenerateRequest.FromString(content)
        refuse_unknown_fields(asked)
        await accepted_request(asked, MODEL)
    except (DecodeError, InvalidRequest):
        return False
    return True


# -- files of API keys


def try_keys(draw: Random) -> bool:
    """The text of a file of keys."""
    keys = {f"k{n}": KeyRecord(hash=hash_of(str(n)), models=("m", '"\\')) for n in range(draw.randrange(3))}
    text = damaged(draw, written(keys).encode()).decode(errors="replace")
    try:
        parse_keys(text)
    except ValueError:
        return False
    return True


OFFLINE: dict[str, Callable[[Random], bool]] = {
    "frames": try_frames,
    "bulk": try_bulk,
    "control": try_control,
    "keys": try_keys,
}
"""Parts that need no event loop."""


async def one(part: str, draw: Random) -> bool:
    """One input of a part that needs no server. Returns whether it was taken for valid."""
    if part == "requests":
        return await try_request(draw)
    await asyncio.sleep(0)
    return OFFLINE[part](draw)
