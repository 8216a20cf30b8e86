"""Spotjax without its server: scheduler, stages, commit log in memory and streams, in this process, on one device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import open_model


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    config = ServeConfig(
        model=directory, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=settings["batch"],
        max_model_len=settings["context"], durability="none", prefix_cache=False,  # prompts are repeated
    )  # fmt: skip
    devices = embedded.local_instances(1, 1)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(embedded.serve_model(config, open_model(directory), devices))
    runs = 0

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        nonlocal runs
        runs += 1
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)

        async def read(row: int, name: str) -> None:
            async for delta in server.service.stream(name):
                for number in delta.tokens:
                    token(row, number)

        async def run() -> None:
            names = [f"{runs}-{row}" for row in range(len(prompts))]
            for name, prompt in zip(names, prompts, strict=True):
                server.service.submit(GenerationRequest(name, tuple(prompt), sampling))
            await asyncio.gather(*(read(row, name) for row, name in enumerate(names)))

        loop.run_until_complete(run())
        server.cluster.model.executables.wait_for_background()

    generate([[0] * settings["prompt"]] * settings["batch"], settings["count"], lambda row, number: None)
    return generate
