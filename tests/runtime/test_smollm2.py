"""A published model, SmolLM2-135M-Instruct, against Hugging Face: slow, so run with ``pytest -m slow``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from serving_cases import GOLDEN

from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, local_instances, serve_model
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import cached_path, open_model

NAME = "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cached_path(NAME).is_file(), reason=f"the model is not here; run: spotjax fetch {NAME}"),
]


@pytest.fixture
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    config = ServeConfig(
        model=NAME,
        durability="none",
        instances=2,
        devices_per_instance=3,
        mesh=request.param,
        max_model_len=128,
        max_batch=4,
        prefill_tokens=64,
        instance_memory_bytes=1 << 34,
        compilation_cache=str(tmp_path),
    )
    server = await serve_model(config, open_model(NAME), local_instances(2, 3))
    yield server
    await server.close()


@pytest.mark.parametrize("server", ["1x1x1", "1x2x3"], indirect=True)
async def test_text_equals_hugging_face_with_a_preemption_in_the_middle(server: EmbeddedServer) -> None:
    with np.load(GOLDEN / "smollm2.npz") as file:
        golden = dict(file)
    prompts = [golden[f"prompt_{number}"].tolist() for number in range(3)]
    for number, prompt in enumerate(prompts):
        assert server.tokenizer.encode(str(golden[f"text_{number}"]), add_special_tokens=False) == prompt
        sampling = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
        server.service.submit(GenerationRequest(f"chat-{number}", tuple(prompt), sampling))

    async def tokens(number: int) -> list[int]:
        found: list[int] = []
        async for delta in server.service.stream(f"chat-{number}"):
            found += delta.tokens
        return found

    following = [asyncio.create_task(tokens(number)) for number in range(3)]
    while server.service.status().tokens_committed < 20:
        await asyncio.sleep(0.01)
    await server.service.preempt("instance-0", 10.0)
    for number, found in enumerate(await asyncio.gather(*following)):
        assert found == golden[f"greedy_{number}"].tolist()
