"""A checkpoint is saved while requests run: they do not notice, and what was saved can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import random_model, verify
from embedded_cases import CONFIG, LARGE_MEMORY

from spotjax.checkpoint import from_host
from spotjax.checkpoint.contents import contents_of
from spotjax.checkpoint.generation import load_generation
from spotjax.checkpoint.parameters import ParameterWriter, Source
from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer, local_instances, serve_model
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.errors import CheckpointError
from spotjax.meshes.slices import whole
from spotjax.models.catalog import Model, open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.orbax_manifest import Part

PROMPTS = {"a": (1, 2, 3), "b": (7, 8, 9, 10, 11)}
SAMPLING = SamplingParams(max_tokens=50, temperature=0.8, seed=5, ignore_eos=True)


async def serve(programs: Path, model: Model | None = None, log: Path | None = None) -> EmbeddedServer:
    """Two stages of two devices, and others that are spare."""
    config = ServeConfig(
        model="random", mesh="1x2x2", max_batch=4, prefill_tokens=16, page_size=8, fuse=False,
        instance_memory_bytes=LARGE_MEMORY, compilation_cache=str(programs),
        durability="none" if log is None else "step", commit_log=str(log or ""),
    )  # fmt: skip
    return await serve_model(config, model or random_model(CONFIG), local_instances(4, 2))


async def ask(server: EmbeddedServer) -> dict[str, list[int]]:
    """What it says to all prompts."""

    async def answer(name: str, prompt: tuple[int, ...]) -> list[int]:
        await server.service.submit(GenerationRequest(name, prompt, SAMPLING))
        return [token async for delta in server.service.stream(name) for token in delta.tokens]

    return dict(zip(PROMPTS, await asyncio.gather(*(answer(*item) for item in PROMPTS.items())), strict=True))


def same_weights(directory: Path) -> None:
    """All arrays are those of the model, bit for bit."""
    saved, weights = OrbaxCheckpoint(directory), random_model(CONFIG).checkpoint
    for array in weights.spec.parameters:
        found, expected = (one.read(array.name, whole(array.shape)) for one in (saved, weights))
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), array.name
    verify(saved)
    float32 = np.dtype(np.float32)
    assert fingerprint(saved, float32) == fingerprint(weights, float32)


async def test_what_is_saved_while_requests_run_can_be_served_and_says_the_same(programs: Path, tmp_path: Path) -> None:
    server = await serve(programs, log=tmp_path / "log")
    running = asyncio.create_task(ask(server))
    while server.service.status().tokens_committed < 5:
        await asyncio.sleep(0)
    saved = await server.service.save(str(tmp_path / "saved"), parameters=True, state=True, seconds=10)
    outputs = await running
    service = server.service._log.identity
    await server.close()
    parameter_bytes = sum(int(np.prod(a.shape)) for a in random_model(CONFIG).checkpoint.spec.parameters) * 4
    assert (saved.parameter_bytes, saved.requests) == (parameter_bytes, 2)
    assert (saved.sequences, saved.positions, saved.kv_bytes, saved.left_out) == (0, 0, 0, ())
    same_weights(tmp_path / "saved")
    (found,) = contents_of(str(tmp_path / "saved")).saves
    assert (found.service, found.kv, found.generation) == (service, "none", True)
    place = tmp_path / "saved" / "saves" / service / "000001.generation"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (place, *place.rglob("*"))), "prompts are private"
    state = load_generation(place)
    assert state.identity == service and len(state.requests) == 2
    for recorded in state.requests:
        name, (sequence,) = recorded.request.request_id, recorded.states
        assert sequence.prompt == PROMPTS[name] and list(sequence.tokens) == outputs[name][: len(sequence.tokens)]
    again = await serve(programs, open_model(str(tmp_path / "saved")))
    assert await ask(again) == outputs
    await again.close()


async def test_what_cannot_be_saved_is_refused_before_anything_is_written(programs: Path, tmp_path: Path) -> None:
    server, place = await serve(programs), tmp_path / "saved"
    with pytest.raises(CheckpointError, match="durability none keeps no commit log"):
        await server.service.save(str(place), parameters=True, state=True, seconds=1)
    assert not place.exists()
    await server.service.save(str(place), parameters=True, state=False, seconds=1)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with pytest.raises(CheckpointError, match="is a complete checkpoint already"):
        await server.service.save(str(place), parameters=True, state=False, seconds=1)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be"):
        await server.service.save(str(tmp_path / "file"), parameters=True, state=False, seconds=1)
    await server.close()


async def test_one_save_goes_on_at_a_time(programs: Path, tmp_path: Path) -> None:
    server = await serve(programs)
    first = asyncio.create_task(server.service.save(str(tmp_path / "1"), parameters=True, state=False, seconds=1))
    await asyncio.sleep(0)
    with pytest.raises(CheckpointError, match=r"a save to .*1 is under way; try again"):
        await server.service.save(str(tmp_path / "2"), parameters=True, state=False, seconds=1)
    first.cancel()  # whoever asked has gone away
    while not (tmp_path / "1" / "manifest.json").exists():
        await asyncio.sleep(0.01)
    same_weights(tmp_path / "1")
    await server.close()


async def test_a_save_whose_instance_is_lost_fails_and_the_next_one_completes_it(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve(programs)
    placement = server.service.status().placement
    assert placement is not None
    loop, write, written = asyncio.get_running_loop(), ParameterWriter.write, list[str]()

    def lose_then_write(writer: ParameterWriter, part: str, sources: Mapping[str, Source]) -> Part:
        written.append(part)
        if len(written) == 2:
            lost = server.service.preempt(placement.group(0, 0)[0].instance, 0)
            asyncio.run_coroutine_threadsafe(lost, loop).result(30)
        return write(writer, part, sources)

    monkeypatch.setattr(from_host.ParameterWriter, "write", lose_then_write)
    with pytest.raises(CheckpointError):
        await server.service.save(str(tmp_path), parameters=True, state=False, seconds=1)
    assert not (tmp_path / "manifest.json").exists()
    events = [event.message for event in server.service.recent() if event.kind == "saved"]
    assert len(events) == 1 and "not all was saved" in events[0]
    await server.service.save(str(tmp_path), parameters=True, state=False, seconds=1)
    parts = ["embedding", *(f"layers.{layer}" for layer in range(CONFIG.layers)), "output"]
    assert sorted(written[2:]) == sorted(parts[1:]), "the first part stays"
    same_weights(tmp_path)
    await server.close()


async def test_parts_that_a_save_of_another_model_left_are_not_taken_for_ours(programs: Path, tmp_path: Path) -> None:
    others = random_model(CONFIG).checkpoint
    others._seed = 1  # type: ignore[attr-defined]
    writer = ParameterWriter(str(tmp_path), CONFIG, "float32")
    for part, arrays in writer.parts.items():
        writer.write(part, {a.name: lambda index, name=a.name: others.read(name, index) for a in arrays.values()})  # type: ignore[misc]
    writer.close()
    server = await serve(programs)
    await server.service.save(str(tmp_path), parameters=True, state=False, seconds=1)
    same_weights(tmp_path)
    await server.close()
