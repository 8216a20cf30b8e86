"""A service with int8 matrices: instances come and go and a checkpoint is saved, and nobody notices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from checkpoint_cases import verify, words
from embedded_cases import CONFIG, LARGE_MEMORY
from serving_cases import RandomCheckpoint

from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, local_instances, serve_model
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import Model, open_model
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.quantized_checkpoint import QuantizedCheckpoint

PROMPT = (1, 2, 3, 5, 8)
SAMPLING = SamplingParams(max_tokens=50, temperature=0.8, seed=5, ignore_eos=True)


async def serve(programs: Path, model: Model) -> EmbeddedServer:
    config = ServeConfig(
        model="random", quantization="int8", max_batch=4, prefill_tokens=16, page_size=8, fuse=False, mesh="1x2x2",
        instance_memory_bytes=LARGE_MEMORY, compilation_cache=str(programs), durability="none",
    )  # fmt: skip
    return await serve_model(config, model, local_instances(4, 2))


async def answer(server: EmbeddedServer, name: str, *, disturbed: bool = False, saved: str = "") -> list[int]:
    """What it says, while instances are taken, one with notice and one without, and a checkpoint is saved."""
    tokens: list[int] = []
    changes = [("instance-0", 5.0, 10), ("instance-1", 0.0, 30)] if disturbed else []
    await server.service.submit(GenerationRequest(name, PROMPT, SAMPLING))

    async def follow() -> None:
        async for delta in server.service.stream(name):
            tokens.extend(delta.tokens)

    following = asyncio.create_task(follow())
    for instance, grace, least in changes:
        while len(tokens) < least:
            await asyncio.sleep(0)
        await server.service.preempt(instance, grace)
    if saved:
        await server.service.save(saved, parameters=True, state=False, seconds=10)
    async with asyncio.timeout(60):
        await following
    return tokens


async def test_preemptions_change_no_token_and_what_is_saved_on_the_way_says_the_same(
    programs: Path, tmp_path: Path
) -> None:
    weights = QuantizedCheckpoint(RandomCheckpoint(CONFIG))  # type: ignore[arg-type]
    server = await serve(programs, Model("random", weights, words(CONFIG.vocab)))
    try:
        undisturbed = await answer(server, "undisturbed")
        disturbed = await answer(server, "disturbed", disturbed=True, saved=str(tmp_path))
        held = server.cluster.held()
        kinds = {weights.spec.element_type(name) for arrays in held.values() for name in arrays}
        server.service.check()
    finally:
        await server.close()
    assert len(undisturbed) == 50 and disturbed == undisturbed
    assert kinds == {None, "int8", "float32"}
    saved = open_model(str(tmp_path), "int8")
    assert isinstance(saved.checkpoint, OrbaxCheckpoint)
    verify(saved.checkpoint)
    again = await serve(programs, saved)
    try:
        assert await answer(again, "again") == undisturbed
    finally:
        await again.close()
