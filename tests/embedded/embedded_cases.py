"""A server over a tiny random model on four instances of two devices, and requests of all kinds to run through it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from serving_cases import Letters, RandomCheckpoint

from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, local_instances, serve_model
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, Logprobs, SamplingParams
from spotjax.errors import NoSpareDevices, UnknownInstance
from spotjax.fleet.observer import Observer
from spotjax.meshes.instance import InstanceState
from spotjax.models.catalog import Model
from spotjax.models.config import DecoderConfig

CONFIG = DecoderConfig(vocab=61, width=24, layers=5, heads=6, kv_heads=3, head_size=4, mlp=50, max_positions=64)
"""Five layers split unevenly over stages, and two shards share the middle kv head."""
INSTANCES = [f"instance-{number}" for number in range(4)]
LARGE_MEMORY = 1 << 30

_prompts = np.random.default_rng(11)
_greedy = SamplingParams(max_tokens=20, temperature=0)
KINDS = {
    "greedy": _greedy,
    "long": replace(_greedy, max_tokens=12),
    "seeded": replace(_greedy, temperature=0.9, top_p=0.9, seed=2**40 + 7),
    "choices": replace(_greedy, temperature=1.2, top_k=20, min_p=0.01, seed=5),
    "penalised": replace(
        _greedy, temperature=0.7, seed=9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2
    ),
    "logprobs": replace(_greedy, logprobs=3, logit_bias={4: 2.0, 9: -50.0}),
    "stopped": replace(_greedy, max_tokens=24, temperature=1.0, seed=3, stop=("aa", "q", "zz"), logprobs=0),
}
PROMPTS = {
    kind: tuple(_prompts.integers(0, CONFIG.vocab, 40 if kind == "long" else 3 + 4 * number).tolist())
    for number, kind in enumerate(KINDS)
}
for _kind in ("seeded", "logprobs"):  # they begin as another one does
    PROMPTS[_kind] = PROMPTS["long"][:16] + PROMPTS[_kind]


@dataclass
class Output:
    """What a client of one request has seen, choice by choice."""

    tokens: list[list[int]]
    text: list[str]
    logprobs: list[list[Logprobs]]
    finish: list[FinishReason | None]


@dataclass
class Run:
    """Requests of every kind on their way through a server."""

    server: EmbeddedServer
    tag: str
    kinds: Sequence[str] = tuple(KINDS)
    tokens: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        for kind in self.kinds:
            n = 2 if kind == "choices" else 1
            self.server.service.submit(GenerationRequest(f"{self.tag}-{kind}", PROMPTS[kind], KINDS[kind], n=n))
        self._clients = [asyncio.create_task(self._follow(kind)) for kind in self.kinds]

    async def reached(self, tokens: int, stalled: Callable[[], bool] = lambda: False) -> None:
        """Returns when clients have seen that many tokens, all requests have ended, or none can go on."""
        while self.tokens < tokens and not all(client.done() for client in self._clients) and not stalled():
            self.changed.clear()
            await self.changed.wait()

    async def outputs(self) -> dict[str, Output]:
        """What every client has seen when all have ended."""
        async with asyncio.timeout(60):
            return dict(zip(self.kinds, await asyncio.gather(*self._clients), strict=True))

    async def _follow(self, kind: str) -> Output:
        n = 2 if kind == "choices" else 1
        seen = Output([[] for _ in range(n)], [""] * n, [[] for _ in range(n)], [None] * n)
        async for delta in self.server.service.stream(f"{self.tag}-{kind}"):
            assert delta.offset == len(seen.tokens[delta.choice]), "a token was lost or came twice"
            assert seen.finish[delta.choice] is None, "something came after the end"
            seen.tokens[delta.choice] += delta.tokens
            seen.text[delta.choice] += delta.text
            seen.logprobs[delta.choice] += delta.logprobs
            seen.finish[delta.choice] = delta.finish
            self.tokens += len(delta.tokens)
            self.changed.set()
        self.changed.set()
        return seen


def same(found: dict[str, Output], expected: dict[str, Output]) -> None:
    """Asserts that clients have seen the same, log-probabilities up to rounding."""
    for kind, output in found.items():
        wanted = expected[kind]
        assert (output.tokens, output.text, output.finish) == (wanted.tokens, wanted.text, wanted.finish), kind
        for ours, theirs in zip(output.logprobs, wanted.logprobs, strict=True):
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a.token, b.token, atol=1e-4)
                assert [token for token, _ in a.top] == [token for token, _ in b.top]


async def start_server(programs: Path, observer: Observer | None = None, **settings: object) -> EmbeddedServer:
    """A server of the tiny model; ``programs`` keeps what is compiled for the next one."""
    config = ServeConfig(
        model="random",
        durability="none",
        max_batch=4,
        prefill_tokens=16,
        page_size=8,
        compilation_cache=str(programs),
        **{"fuse": False, "instance_memory_bytes": LARGE_MEMORY, **settings},  # type: ignore[arg-type]
    )
    model = Model("random", RandomCheckpoint(CONFIG), Letters())  # type: ignore[arg-type]
    return await serve_model(config, model, local_instances(4, 2), observer)


def state_of(server: EmbeddedServer, instance: str) -> InstanceState:
    return next(status.state for status in server.service.status().instances if status.name == instance)


def gone(server: EmbeddedServer) -> list[str]:
    return [name for name in INSTANCES if state_of(server, name) is InstanceState.GONE]


async def unless_refused(change: Awaitable[object]) -> None:
    """Carries out a change; one that names a lost instance, or wants more than there are, is refused."""
    try:
        await change
    except (UnknownInstance, NoSpareDevices):
        return


async def restore(server: EmbeddedServer) -> None:
    """Brings all instances back."""
    if missing := gone(server):
        await server.service.add(len(missing))
    assert server.service.status().ready


def nothing_left_on(devices: set[jax.Device], besides: Sequence[jax.Array] = ()) -> bool:
    """Whether no array, besides those, has a buffer on the devices."""
    others = {id(array) for array in besides}

    def left() -> bool:
        return any(id(array) not in others and array.devices() & devices for array in jax.live_arrays())

    if left():
        gc.collect()  # takes long; only exceptions of failed steps keep results of theirs until then
    return not left()


Change = Callable[[EmbeddedServer], Awaitable[object]]
