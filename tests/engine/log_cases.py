"""Requests and states for tests of the commit log, a model of what it should have, and small limits."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from spotjax.engine import log_database, log_writer
from spotjax.engine.commit_log import CommitLog, RecordedRequest
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, Logprobs, RequestState, SamplingParams

END = frozenset({0, 7})


def new_request(name: str, n: int = 1, **sampling: object) -> RecordedRequest:
    """A request without output; its key comes from its name."""
    params = SamplingParams(**sampling)
    prompt = tuple(name.encode())
    states = tuple(RequestState(name, choice, prompt, params, END) for choice in range(n))
    return RecordedRequest(
        GenerationRequest(name, prompt, params, n, resumable=True), states, zlib.crc32(name.encode())
    )


def token_at(name: str, choice: int, position: int) -> int:
    """What every sequence of these tests has at a place."""
    return zlib.crc32(f"{name} {choice} {position}".encode()) % 50_000


def grown(state: RequestState, count: int = 1, finish: FinishReason | None = None) -> RequestState:
    """A state with more tokens, each with a text of some length, some of it held back."""
    for _ in range(count):
        token = token_at(state.request_id, state.choice, len(state.tokens))
        new = state.pending + "aé€😀"[: token % 5]
        held = token % 3 if token % 3 < len(new) else 0
        text = state.text + new[: len(new) - held]
        logprobs = (Logprobs(-token / 3, ((token, -0.1),)),) if state.sampling.logprobs is not None else ()
        state = replace(
            state,
            tokens=(*state.tokens, token),
            text=text,
            text_ends=(*state.text_ends, len(text)),
            pending=new[len(new) - held :],
            decoded=len(state.tokens) + 1 - token % 2,
            logprobs=(*state.logprobs, *logprobs),
        )
    return state if finish is None else state.finished(finish)


def recorded(log: CommitLog) -> dict[str, RecordedRequest]:
    """What a log was opened with, by id, in order."""
    return {found.request.request_id: found for found in log.replay()}


async def accepted(log: CommitLog, request: RecordedRequest) -> list[RequestState]:
    """Its states once it is recorded."""
    await log.accept(request.request, request.states, request.key)
    return list(request.states)


async def told(log: CommitLog, states: Iterable[RequestState]) -> None:
    """Records a step and waits until it may be told."""
    event = asyncio.Event()
    log.append(tuple(states), event.set)
    await event.wait()


def opened(directory: Path, durability: str = "step", model: str = "model", **options: bool) -> DurableLog:
    return DurableLog.open(directory, durability, model, **options)


async def contents(directory: Path, **options: bool) -> dict[str, RecordedRequest]:
    """What a log has that nobody has open."""
    log = opened(directory, **options)
    found = recorded(log)
    await log.close()
    return found


@contextmanager
def small_limits(rows: int = 8, piece: int = 3, wal: int = 64 << 10) -> Iterator[None]:
    """Compaction, checkpoints and idle times come often."""
    limits = mock.patch.multiple(log_database, JOURNAL_ROWS=rows, SLICE_ROWS=piece, WAL_BYTES=wal)
    with limits, mock.patch.object(log_writer, "IDLE_SECONDS", 0.001):
        yield


class Traffic:
    """Random requests that are accepted, grow, end and are forgotten, and what a log should have of them."""

    def __init__(self, chance: random.Random, held: dict[str, RecordedRequest] | None = None) -> None:
        self.chance = chance
        self.held = dict(held or {})
        self._count = 0

    def accept(self, prefix: str) -> RecordedRequest:
        self._count += 1
        logprobs = self.chance.choice([None, None, 1])
        request = new_request(f"{prefix}-{self._count}", self.chance.choice([1, 1, 2, 3]), logprobs=logprobs)
        self.held[request.request.request_id] = request
        return request

    def step(self) -> Sequence[RequestState]:
        """Some of the running sequences gain a token or more, or end."""
        states = []
        for name, request in self.held.items():
            for state in request.states:
                if state.finish is None and self.chance.random() < 0.7:
                    ends = self.chance.random() < 0.03
                    states.append(grown(state, self.chance.choice([1, 1, 1, 3]), FinishReason.STOP if ends else None))
            new = {state.choice: state for state in states if state.request_id == name}
            after = tuple(new.get(state.choice, state) for state in request.states)
            self.held[name] = replace(request, states=after)
        self.chance.shuffle(states)
        return states

    def forget(self) -> str | None:
        if not self.held:
            return None
        name = self.chance.choice(list(self.held))
        del self.held[name]
        return name
