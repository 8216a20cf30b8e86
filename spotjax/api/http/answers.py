"""How completions and chat completions are answered: whole, or as a stream. Shapes are in modules of their own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from spotjax.api.http.event_stream import event
from spotjax.api.http.generating import Generating
from spotjax.engine.generation import Delta
from spotjax.engine.request import Logprobs

DONE = b"data: [DONE]\n\n"
ENCODER = msgspec.json.Encoder()


class UsageShape(msgspec.Struct, frozen=True):
    """Tokens of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass
class Choice:
    """A whole choice, as it comes together."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str = ""


class Counter:
    """Counts the tokens of a call.

    Args:
      n: choices of each prompt.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._prompts: dict[int, int] = {}
        self._output = 0

    def count(self, choice: int, delta: Delta) -> None:
        """Takes note of the end of a choice; prompts count once."""
        if delta.usage is not None:
            self._prompts[choice // self._n] = delta.usage.prompt_tokens
            self._output += delta.usage.completion_tokens

    @property
    def usage(self) -> UsageShape:
        """So far."""
        prompts = sum(self._prompts.values())
        return UsageShape(prompts, self._output, prompts + self._output)


class Shapes(ABC):
    """One answer of one kind.

    Args:
      base: names the call.
      model: its name.
    """

    prefix: ClassVar[str]
    whole: ClassVar[str]
    piece: ClassVar[str]
    """``object`` of whole answers and of pieces."""

    def __init__(self, base: str, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}{base}", "created": int(time.time()), "model": model, "system_fingerprint": None,
        }  # fmt: skip
        self._begin = ENCODER.encode({**self._head, "object": self.piece})[:-1] + b',"choices":'

    @abstractmethod
    def opening(self, choice: int) -> Any:
        """The first piece of a choice, before it has output; None where there is none."""

    @abstractmethod
    def pieces(self, choice: int, delta: Delta) -> list[tuple[bool, Any]]:
        """Pieces of the stream for a delta, each with whether it tells the end of the choice."""

    @abstractmethod
    def choice(self, number: int, choice: Choice) -> Any:
        """A whole choice."""

    def answer(self, choices: Sequence[Choice], usage: UsageShape) -> bytes:
        """The whole answer."""
        told = [self.choice(number, choice) for number, choice in enumerate(choices)]
        return ENCODER.encode({**self._head, "object": self.whole, "choices": told, "usage": usage})

    def chunk(self, choices: Sequence[Any], usage: bytes = b"") -> bytes:
        """The data of one event; ``usage`` is JSON, empty where there is to be no such field."""
        return b"".join((self._begin, ENCODER.encode(choices), b',"usage":' if usage else b"", usage, b"}"))


async def whole_answer(generating: Generating, shapes: Shapes, n: int) -> bytes:
    """All choices together."""
    choices = [Choice() for _ in generating.progress.tokens]
    counter = Counter(n)
    async for number, delta in generating.deltas():
        choice = choices[number]
        choice.text.append(delta.text)
        choice.tokens += delta.tokens
        choice.logprobs += delta.logprobs
        if delta.finish is not None:
            choice.finish = delta.finish.value
            counter.count(number, delta)
    return shapes.answer(choices, counter.usage)


async def answer_events(
    generating: Generating, shapes: Shapes, n: int, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events that the client does not have yet, as they come."""
    progress, counter = generating.progress, Counter(n)
    none = b"null" if include_usage else b""
    for number, tokens in enumerate(progress.tokens):
        if tokens < 0:
            progress.tokens[number] = 0
            if (opening := shapes.opening(number)) is not None:
                yield event(progress.event_id, shapes.chunk([opening], none))
    async for number, delta in generating.deltas():
        counter.count(number, delta)
        if number in progress.finished:  # the service says again how choices ended
            continue
        told = []
        progress.tokens[number] = delta.offset + len(delta.tokens)
        for ends, piece in shapes.pieces(number, delta):
            if ends:
                progress.finished.add(number)
            told.append(event(progress.event_id, shapes.chunk([piece], none)))
        if told:
            yield b"".join(told)
    if include_usage and not progress.usage:
        progress.usage = True
        yield event(progress.event_id, shapes.chunk([], ENCODER.encode(counter.usage)))
    yield DONE
