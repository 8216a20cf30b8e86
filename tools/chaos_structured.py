"""Whether output keeps to its structure, and stays the same, while instances and the controller are taken away.

``python -m spotjax.tools.chaos_structured --runs 1000`` serves the shipped model in this process on four instances of
virtual devices. Requests with random JSON schemas, regular expressions and grammars run in waves: once undisturbed, and
once while instances are taken at random token boundaries, with notice and without, and come back; in some waves the
controller ends and another one takes up its log. Every output must match what was asked for, by ``jsonschema`` and
``re``, and be token for token that of the undisturbed run. Prints a summary; exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, local_instances, serve_model
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason
from spotjax.errors import NoSpareDevices, UnknownInstance
from spotjax.meshes.instance import InstanceState
from spotjax.models.catalog import Model
from spotjax.tools.random_model import small_model
from spotjax.tools.structure_mix import StructuredRequest, structure_mix

INSTANCES, DEVICES = 4, 2
MOST_WRONG = 20
"""After so many there is no point in going on."""
WAVE = 16
"""Requests at once."""
GRACES = (0.0, 0.0, 0.001, 0.05, 2.0)
"""Seconds of notice; 0 is none."""
console = Console()


@dataclass
class Output:
    """What a client has seen of one request.

    Attributes:
      tokens, text, finish: as they came.
      interrupted: times that something was taken away meanwhile.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    interrupted: int = 0


@dataclass
class Verdict:
    """What became of all runs.

    Attributes:
      runs: that there were.
      interrupted: of them, those that something was taken from.
      preemptions, restarts: that happened.
      tokens: of the disturbed runs.
      wrong: what was not as promised, one line each.
    """

    runs: int = 0
    interrupted: int = 0
    preemptions: int = 0
    restarts: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


class StructuredChaos:
    """Runs waves of requests through a server that it takes things away from.

    Args:
      model: to serve.
      directory: for the commit log and compiled programs; empty.
      draw: of what happens when.
      settings: of the server, others than here.
    """

    def __init__(self, model: Model, directory: Path, draw: random.Random, **settings: Any) -> None:
        self._model, self._directory, self._draw, self._settings = model, directory, draw, settings
        self._server: EmbeddedServer | None = None
        self._seen, self._changed = 0, asyncio.Event()
        self.verdict = Verdict()

    async def start(self) -> None:
        """Starts a controller on the log."""
        config = ServeConfig(
            model=self._model.name,
            durability="interval",
            commit_log=str(self._directory / "log"),
            fuse=False,
            instance_memory_bytes=1 << 30,
            **{"compilation_cache": str(self._directory / "programs"), "max_batch": WAVE, **self._settings},
        )
        self._server = await serve_model(config, self._model, local_instances(INSTANCES, DEVICES))

    async def close(self) -> None:
        """Ends it."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def wave(self, number: int, requests: Sequence[StructuredRequest], *, restart: bool) -> None:
        """One wave, twice."""
        expected = await self._run(f"{number}-calm", requests, [], restart=False)
        total = sum(len(output.tokens) for output in expected.values())
        moments = sorted(self._draw.randint(0, total * 3 // 4) for _ in range(self._draw.randint(1, 4)))
        found = await self._run(f"{number}-wild", requests, moments, restart=restart)
        for request in requests:
            self._judge(request, expected[request.name], found[request.name])

    def _judge(self, request: StructuredRequest, expected: Output, found: Output) -> None:
        verdict = self.verdict
        verdict.runs += 1
        verdict.interrupted += bool(found.interrupted)
        verdict.tokens += len(found.tokens)
        if (found.tokens, found.text, found.finish) != (expected.tokens, expected.text, expected.finish):
            verdict.wrong.append(f"{request.name}: {found.text!r} ({found.finish}), undisturbed {expected.text!r}")
        if found.finish is not FinishReason.STOP or not request.matches(found.text):
            verdict.wrong.append(f"{request.name}: {found.text!r} ({found.finish}) for {request.sampling.structure}")

    async def _run(
        self, tag: str, requests: Sequence[StructuredRequest], moments: Sequence[int], *, restart: bool
    ) -> dict[str, Output]:
        """Runs requests through what happens when clients have seen so many tokens."""
        server = self._serving
        outputs = {request.name: Output() for request in requests}
        self._seen = 0
        for request in requests:
            prompt = tuple(server.tokenizer.encode(request.prompt, add_special_tokens=True))
            await server.grammars.check(request.sampling.structure)  # type: ignore[arg-type]
            name = f"{tag}-{request.name}"
            await server.service.submit(GenerationRequest(name, prompt, request.sampling, resumable=True))
        clients = self._follow_all(tag, outputs)
        fatal = self._draw.randrange(len(moments)) if restart else -1
        changes: list[asyncio.Task[None]] = []
        for place, moment in enumerate(moments):
            await self._reached(moment, clients)
            for output in outputs.values():
                output.interrupted += output.finish is None
            if place == fatal:
                await asyncio.gather(*changes, return_exceptions=True)
                clients = await self._restart(tag, outputs, clients)
            else:
                changes.append(asyncio.create_task(self._take(f"instance-{self._draw.randrange(INSTANCES)}")))
        await asyncio.gather(*changes)
        await self._restore()
        async with asyncio.timeout(120):
            await asyncio.gather(*clients)
        return outputs

    @property
    def _serving(self) -> EmbeddedServer:
        assert self._server is not None, "start comes first"
        return self._server

    def _follow_all(self, tag: str, outputs: dict[str, Output]) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._follow(f"{tag}-{name}", output)) for name, output in outputs.items()]

    async def _follow(self, name: str, output: Output) -> None:
        async for delta in self._serving.service.stream(name, (len(output.tokens),)):
            assert delta.offset == len(output.tokens), "a token was lost or came twice"
            output.tokens += delta.tokens
            output.text += delta.text
            output.finish = delta.finish or output.finish
            self._seen += len(delta.tokens)
            self._changed.set()

    async def _reached(self, tokens: int, clients: Sequence[asyncio.Task[None]]) -> None:
        while self._seen < tokens and not all(client.done() for client in clients):
            self._changed.clear()
            await asyncio.wait([asyncio.ensure_future(self._changed.wait())], timeout=0.5)

    async def _take(self, instance: str) -> None:
        """Takes an instance, and lets one join afterwards."""
        try:
            await self._serving.service.preempt(instance, self._draw.choice(GRACES))
            self.verdict.preemptions += 1
            await self._serving.service.add(1)
        except (UnknownInstance, NoSpareDevices):
            return

    async def _restart(
        self, tag: str, outputs: dict[str, Output], clients: Sequence[asyncio.Task[None]]
    ) -> list[asyncio.Task[None]]:
        """The controller ends; another one takes up what it left."""
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await self.close()
        await self.start()
        self.verdict.restarts += 1
        return self._follow_all(tag, outputs)

    async def _restore(self) -> None:
        """Brings all instances back."""
        service = self._serving.service
        if gone := sum(one.state is InstanceState.GONE for one in service.status().instances):
            await service.add(gone)


async def chaos(
    model: Model, directory: Path, runs: int, seed: int, restarts: int, wave: int = WAVE, **settings: Any
) -> Verdict:
    """Waves until so many runs were interrupted; progress goes to the console."""
    draw = random.Random(seed)
    fatal = set(draw.sample(range(-(-runs // wave)), min(restarts, -(-runs // wave))))
    service = StructuredChaos(model, directory, draw, **settings)
    verdict = service.verdict
    await service.start()
    try:
        for number in itertools.count():
            await service.wave(number, structure_mix(seed << 32 | number, wave), restart=number in fatal)
            if verdict.interrupted >= runs or len(verdict.wrong) > MOST_WRONG:
                return verdict
            if number % 8 == 7:
                console.print(f"{verdict.interrupted} interrupted, {len(verdict.wrong)} wrong", highlight=False)
    finally:
        await service.close()
    raise AssertionError("waves never end by themselves")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=48, help="interrupted requests at least (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance (default: 0)")
    parser.add_argument("--restarts", type=int, default=2, help="waves in which the controller ends (default: 2)")
    parser.add_argument("--width", type=int, default=0, help="of a random model instead of the shipped one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        model = small_model(options.width, 3, Path(directory))
        verdict = asyncio.run(chaos(model, Path(directory), options.runs, options.seed, options.restarts))
    for line in verdict.wrong:
        console.print(f"WRONG {line}", highlight=False, markup=False)
    right = verdict.runs - len({line.partition(":")[0] for line in verdict.wrong})
    console.print(
        f"{right} of {verdict.runs} runs as promised; {verdict.interrupted} were interrupted by {verdict.preemptions} "
        f"preemptions and {verdict.restarts} controller restarts; {verdict.tokens} tokens, "
        f"{time.monotonic() - began:.0f} s",
        highlight=False,
    )
    return 1 if verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
