"""Models of every family, served from their directories: Hugging Face's tokens, whatever instance is taken."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from embedded_cases import LARGE_MEMORY
from serving_cases import GOLDEN, checkpoint, golden
from tokenizers import models

from spotjax.checkpoint.convert import convert
from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, start
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import open_model


def publish(case: str, directory: Path) -> Path:
    """A golden model as a directory that can be served."""
    shutil.copytree(GOLDEN / case, directory)
    words = {f"w{number}": number for number in range(checkpoint(case).spec.config.vocab)}
    tokenizers.Tokenizer(models.BPE(words, [])).save(str(directory / "tokenizer.json"))
    return directory


async def generate(server: EmbeddedServer, case: str) -> dict[int, list[int]]:
    """Greedy continuations of the golden prompts; instances are taken, one announced, one not, while they come."""
    seen: dict[int, list[int]] = {number: [] for number in range(3)}

    async def follow(number: int) -> None:
        tokens = seen[number]
        async for delta in server.service.stream(f"{case}-{number}"):
            assert delta.offset == len(tokens)
            tokens += delta.tokens

    for number in seen:
        prompt = tuple(golden(case)[f"prompt_{number}"].tolist())
        sampling = SamplingParams(max_tokens=len(golden(case)["greedy_0"]), temperature=0, ignore_eos=True)
        await server.service.submit(GenerationRequest(f"{case}-{number}", prompt, sampling))
    clients = [asyncio.create_task(follow(number)) for number in seen]
    for instance, grace, least in (("instance-0", 5.0, 30), ("instance-2", 0.0, 100)):
        while sum(map(len, seen.values())) < least:
            await asyncio.sleep(0.001)
        await server.service.preempt(instance, grace)
    async with asyncio.timeout(60):
        await asyncio.gather(*clients)
    return seen


@pytest.mark.parametrize(
    ("case", "converted"),
    [
        ("gpt-neox", False),
        ("gemma3", False),
        ("opt-post-norm", True),
        ("mixtral", True),
    ],
)
async def test_every_family_says_what_hugging_face_says_under_preemption(
    programs: Path, tmp_path: Path, case: str, converted: bool
) -> None:
    directory = publish(case, tmp_path / "published")
    if converted:
        convert(open_model(str(directory)), str(tmp_path / "converted"))
        directory = tmp_path / "converted"
    config = ServeConfig(
        model=str(directory),
        mesh="auto" if converted else "1x2x2",
        instances=4,
        devices_per_instance=2,
        durability="none",
        prefill_tokens=16,
        page_size=8,
        max_batch=4,
        max_model_len=104,
        compilation_cache=str(programs),
        fuse=False,
        instance_memory_bytes=0 if converted else LARGE_MEMORY,
    )
    server = await start(config)
    try:
        found = await generate(server, case)
        for number, tokens in found.items():
            np.testing.assert_array_equal(tokens, golden(case)[f"greedy_{number}"], err_msg=f"prompt {number}")
        server.service.check()
    finally:
        await server.close()
