"""What the commit log writes: requests, and what each step adds to their sequences. Pure; bytes in, bytes out.

A sequence is recorded as *increments*: what a newer state has beyond an older one. Every increment says where it
begins, so one that is missing is noticed when they are joined. Where the bytes go is in ``log_database``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

import msgspec

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, Logprobs, RequestState
from spotjax.errors import InvalidRequest

T = TypeVar("T")


class Extent(NamedTuple):
    """How much of a sequence is recorded: lengths of the fields of its state that only grow, and whether it ended."""

    tokens: int = 0
    logprobs: int = 0
    text: int = 0
    text_ends: int = 0
    ended: bool = False

    @classmethod
    def of(cls, state: RequestState) -> Extent:
        """All of a state."""
        ended = state.finish is not None
        return cls(len(state.tokens), len(state.logprobs), len(state.text), len(state.text_ends), ended)


class Increment(msgspec.Struct, array_like=True, frozen=True):
    """What one or more steps added to one sequence.

    Attributes:
      serial: number of the request in its log.
      choice: of the sequence within the request.
      offset: output tokens before these.
      text_offset: characters of final text before these.
      tokens: new ones.
      text: new final text.
      text_ends: of the new tokens, counted from ``text_offset``.
      pending: held-back text after these.
      decoded: as in the state after these.
      finish: as in the state after these.
      logprobs: of the new tokens when asked for.
    """

    serial: int
    choice: int
    offset: int
    text_offset: int
    tokens: tuple[int, ...]
    text: str
    text_ends: tuple[int, ...]
    pending: str
    decoded: int
    finish: FinishReason | None
    logprobs: tuple[Logprobs, ...]

    @classmethod
    def of(cls, serial: int, state: RequestState, since: Extent) -> Increment:
        """What a state has beyond an earlier one of the same sequence."""
        return cls(
            serial,
            state.choice,
            since.tokens,
            since.text,
            state.tokens[since.tokens :],
            state.text[since.text :],
            tuple(end - since.text for end in state.text_ends[since.text_ends :]),
            state.pending,
            state.decoded,
            state.finish,
            state.logprobs[since.logprobs :],
        )

    def precedes(self, other: Increment) -> bool:
        """Whether the other one begins where this one ends."""
        ends = self.offset + len(self.tokens), self.text_offset + len(self.text)
        return ends == (other.offset, other.text_offset)


class AcceptedRecord(msgspec.Struct, array_like=True, frozen=True):
    """A request as it was accepted.

    Attributes:
      request: what was asked for.
      end_tokens: tokens of the model that end generation.
      key: of its first sequence.
      start: what its sequences had when it was accepted, by choice; of a new request they are empty.
    """

    request: GenerationRequest
    end_tokens: frozenset[int]
    key: int
    start: tuple[Increment, ...]

    @classmethod
    def of(cls, request: GenerationRequest, states: Sequence[RequestState], key: int) -> AcceptedRecord:
        """The record of a request and its sequences, which must be all its choices in order."""
        start = tuple(Increment.of(0, state, Extent()) for state in states)
        return cls(request, states[0].end_tokens, key, start)


class ServiceRecord(msgspec.Struct, array_like=True, frozen=True):
    """Whose log it is.

    Attributes:
      identity: of the service.
      model: fingerprint of what it serves.
      epoch: last that was recorded.
    """

    identity: str
    model: str
    epoch: int


class MalformedRecord(ValueError):
    """Bytes are not those of a record."""


class RecordGap(ValueError):
    """An increment does not begin where the one before it ends."""


def contiguous(increments: Sequence[Increment]) -> int:
    """How many of these follow each other without a gap, from the beginning of the sequence."""
    if not increments or (increments[0].offset, increments[0].text_offset) != (0, 0):
        return 0
    for count in range(1, len(increments)):
        if not increments[count - 1].precedes(increments[count]):
            return count
    return len(increments)


def join(increments: Sequence[Increment]) -> Increment:
    """One increment for several of one sequence, in order.

    Raises:
      RecordGap: one does not begin where the one before it ends.
    """
    first, last = increments[0], increments[-1]
    for before, after in pairwise(increments):
        if not before.precedes(after):
            raise RecordGap(
                f"choice {after.choice} of request number {after.serial} goes on at token {after.offset}, "
                f"where token {before.offset + len(before.tokens)} was to come"
            )
    if len(increments) == 1:
        return first
    ends = (end + part.text_offset - first.text_offset for part in increments for end in part.text_ends)
    return Increment(
        first.serial,
        first.choice,
        first.offset,
        first.text_offset,
        tuple(chain.from_iterable(part.tokens for part in increments)),
        "".join([part.text for part in increments]),
        tuple(ends),
        last.pending,
        last.decoded,
        last.finish,
        tuple(chain.from_iterable(part.logprobs for part in increments)),
    )


def state_of(accepted: AcceptedRecord, choice: int, whole: Increment) -> RequestState:
    """The state of a sequence, from the increment that is all of it."""
    request = accepted.request
    return RequestState(
        request.request_id,
        choice,
        request.prompt,
        request.sampling,
        accepted.end_tokens,
        whole.tokens,
        whole.logprobs,
        whole.text,
        whole.pending,
        whole.decoded,
        whole.text_ends,
        whole.finish,
    )


_encoder = msgspec.msgpack.Encoder()
_accepted = msgspec.msgpack.Decoder(AcceptedRecord)
_service = msgspec.msgpack.Decoder(ServiceRecord)
_increments = msgspec.msgpack.Decoder(list[Increment])


def encode(record: AcceptedRecord | ServiceRecord | Iterable[Increment]) -> bytes:
    """The bytes of a row."""
    return _encoder.encode(record)


def decode_accepted(content: bytes) -> AcceptedRecord:
    """Reads what ``encode`` wrote. Raises MalformedRecord for anything else."""
    return _decode(_accepted, content)


def decode_service(content: bytes) -> ServiceRecord:
    """Reads what ``encode`` wrote. Raises MalformedRecord for anything else."""
    return _decode(_service, content)


def decode_increments(content: bytes) -> list[Increment]:
    """Reads what ``encode`` wrote. Raises MalformedRecord for anything else."""
    return _decode(_increments, content)


def _decode(decoder: msgspec.msgpack.Decoder[T], content: bytes) -> T:
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, ValueError, InvalidRequest) as error:
        raise MalformedRecord(str(error)) from error


def checksum(number: int, content: bytes) -> int:
    """CRC-32 of a row's content and its number, so that a row in the place of another one is noticed."""
    return zlib.crc32(content, number & 0xFFFFFFFF)
