"""Commit logs and saves of KV as a server leaves them, for tests of what is made of them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from spotjax.checkpoint.saves import Save, complete, next_path
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.log_directory import DATABASE
from spotjax.engine.request import FinishReason, RequestState, SamplingParams

MODEL = "fingerprint of a model"


@dataclass(frozen=True)
class Left:
    """A request that a server has left in its log.

    Attributes:
      name: its id, and its prompt.
      tokens: output tokens of each choice.
      ended: whether all its choices have ended.
      resumable: goes on without its client.
      key: of its first sequence.
    """

    name: str
    tokens: tuple[int, ...] = (3,)
    ended: bool = False
    resumable: bool = True
    key: int = 0

    def states(self) -> list[RequestState]:
        """Its sequences."""
        bare = RequestState(self.name, 0, tuple(self.name.encode()), SamplingParams(max_tokens=64))
        return [
            replace(
                bare, choice=choice, tokens=tuple(range(count)), text="x" * count, decoded=count,
                text_ends=tuple(range(1, count + 1)), finish=FinishReason.STOP if self.ended else None,
            )
            for choice, count in enumerate(self.tokens)
        ]  # fmt: skip


def leave_log(directory: Path, requests: Sequence[Left], model: str = MODEL, epoch: int = 3) -> str:
    """Writes a log. Returns its identity."""

    async def write() -> str:
        log = DurableLog.open(directory, "step", model)
        await fill(log, requests)
        log.begin_epoch(epoch)
        await log.close()
        return log.identity

    return asyncio.run(write())


async def fill(log: DurableLog, requests: Sequence[Left]) -> None:
    """Records requests and all their tokens."""
    for left in requests:
        states = left.states()
        sampling, n = states[0].sampling, len(states)
        request = GenerationRequest(left.name, states[0].prompt, sampling, n, left.resumable)
        bare = [replace(state, tokens=(), text="", decoded=0, text_ends=(), finish=None) for state in states]
        await log.accept(request, bare, left.key)
        done = asyncio.Event()
        log.append(states, done.set)
        await done.wait()


def leave_save(checkpoint: Path, service: str, sequences: Mapping[int, int], content: bytes = b"KV") -> Save:
    """Writes a save whose KV is just some bytes."""
    path = Path(next_path(str(checkpoint), service))
    unit = path / "worker-0" / "000001"
    unit.mkdir(parents=True)
    (unit / "content").write_bytes(content)
    return complete(str(path), service, 3, 1, sequences)


def damage(directory: Path, name: str) -> None:
    """Damages what a log has of a request."""
    with closing(sqlite3.connect(directory / DATABASE, isolation_level=None)) as database:
        database.execute("UPDATE requests SET checksum = checksum + 1 WHERE id = ?", (name,))


def files_below(directory: Path) -> dict[str, bytes]:
    """Contents of all files, by path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
