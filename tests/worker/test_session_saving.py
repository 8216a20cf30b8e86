"""In which order a worker saves: parameters beside everything else, KV as the next command, into one directory."""

from __future__ import annotations

import asyncio
from typing import Any

from spotjax.protocol import control
from spotjax.worker.session import Session


class Stream:
    """Takes answers."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def stream_stream(self, *what: Any, **serializers: Any) -> Any:
        return lambda metadata: self

    async def write(self, message: Any) -> None:
        self.answers.append(message)


class Worker:
    """Carries out a command when it is let."""

    def __init__(self) -> None:
        self.gates: dict[int, asyncio.Event] = {}
        self.begun: list[int] = []
        self.expected: list[str] = []
        self.superseded = 0

    async def carry_out(self, command: control.Command) -> control.Done:
        self.begun.append(command.id)
        await self.gates.setdefault(command.id, asyncio.Event()).wait()
        return control.Done(command.id)

    def supersede(self) -> None:
        self.superseded += 1

    def expect_save(self, path: str) -> None:
        self.expected.append(path)


class Case:
    """A session that is given commands."""

    def __init__(self) -> None:
        self.stream, self.worker = Stream(), Worker()
        self.session = Session(self.stream, None, None)  # type: ignore[arg-type]
        self.session._worker = self.worker  # type: ignore[assignment]

    async def tell(self, *commands: Any) -> None:
        for command in commands:
            self.session._begin(command)
        await self.settle()

    async def let(self, number: int) -> None:
        self.worker.gates[number].set()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    @property
    def answered(self) -> list[int]:
        return [answer.id for answer in self.stream.answers]


async def test_saving_parameters_holds_nothing_up_and_is_held_up_by_nothing() -> None:
    case = Case()
    await case.tell(control.Switch(1, ()), control.SaveParameters(2, "/here"), control.Switch(3, ()))
    assert case.worker.begun == [1, 2]
    await case.let(1)
    assert case.worker.begun == [1, 2, 3] and case.answered == [1]
    await case.tell(control.Clear(4))
    await case.let(3)
    await case.let(2)
    assert case.answered == [1, 3, 2] and case.worker.superseded == 1
    assert not case.session._beside
    await case.let(4)


async def test_a_save_of_kv_waits_its_turn_but_its_directory_is_known_at_once() -> None:
    case = Case()
    await case.tell(control.SaveKv(1, "/1", 60.0, True), control.SaveKv(2, "/2", 1.0, False))
    assert case.worker.begun == [1] and case.worker.expected == ["/1", "/2"], "so that the first makes way"
    assert not case.worker.superseded, "nothing that is read for a mesh is given up for it"
    await case.let(1)
    await case.let(2)
    assert case.answered == [1, 2]
