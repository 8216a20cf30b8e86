"""The embedded server under load and over time: pages, cancelled requests, memory, remains of lost instances."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from embedded_cases import CONFIG, INSTANCES, KINDS, Run, gone, nothing_left_on, restore, same, start_server

from spotjax.embedded import EmbeddedServer
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice


async def finished(server: EmbeddedServer, request_id: str) -> FinishReason | None:
    """How the only choice of a request ended."""
    finish = None
    async for delta in server.service.stream(request_id):
        finish = delta.finish
    return finish


async def test_cancelling_half_of_200_requests_frees_their_pages(programs: Path) -> None:
    server = await start_server(programs, mesh="2x2x2")
    generator = np.random.default_rng(0)
    names = [f"request-{number}" for number in range(200)]
    for number, name in enumerate(names):
        prompt = tuple(generator.integers(0, CONFIG.vocab, 3 + number % 20).tolist())
        sampling = replace(KINDS["seeded"], max_tokens=8, seed=number)
        server.service.submit(GenerationRequest(name, prompt, sampling))
    async with asyncio.timeout(60):
        while server.service.status().tokens_committed < 60:
            await asyncio.sleep(0)
        cancelled = {name for name in names[::2] if server.service.cancel(name)}
        ends = dict(zip(names, await asyncio.gather(*(finished(server, name) for name in names)), strict=True))
    assert len(cancelled) > 80
    assert all((ends[name] is FinishReason.CANCELLED) == (name in cancelled) for name in names)
    server.service.check()
    status = server.service.status()
    assert status.requests_running == 0 and all(replica.pages_used == 0 for replica in status.replicas)
    await server.close()


async def test_too_few_pages_delay_requests_and_change_no_token(programs: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(120):
        server = await start_server(programs, mesh="1x2x1")
        run = Run(server, "roomy")
        run.start()
        expected = await run.outputs()
        await server.close()
        tight = await start_server(programs, mesh="1x2x1", kv_pages=9)
        runs = [Run(tight, f"tight-{number}") for number in range(2)]
        for run in runs:
            run.start()
        for run in runs:
            same(await run.outputs(), expected)
        tight.service.check()
        assert tight.service.status().replicas[0].pages_used == 0
        schedulers = [replica.scheduler for replica in tight.service._dispatcher.replicas]
        assert schedulers[0].preempted > 0, "there were pages enough; the case proves nothing"
        run = Run(tight, "disturbed")
        run.start()
        await run.reached(30)
        await tight.service.preempt(INSTANCES[0], 0)
        same(await run.outputs(), expected)
        await tight.close()


async def test_nothing_can_be_read_from_a_lost_instance(programs: Path) -> None:
    before = jax.live_arrays()
    server = await start_server(programs, mesh="2x2x2")
    cluster = server.cluster
    run = Run(server, "run")
    run.start()
    await run.reached(10)
    store, stages = cluster._host.store, [stage for pipeline in cluster.pipelines for stage in pipeline.stages]
    lost = set(cluster._devices["instance-2"])
    on_lost = [stage for stage in stages if lost & set(stage.devices)]
    shards = dict(store.at(DeviceRef("instance-2", 1)))
    assert on_lost and shards
    change = asyncio.ensure_future(server.service.preempt("instance-2", 0))
    await asyncio.sleep(0)
    for name, held in shards.items():
        with pytest.raises(RuntimeError, match="deleted"):
            store.read(DeviceRef("instance-2", 1), ArraySlice(name, held.index))
    for stage in on_lost:
        for array in stage.arrays():
            with pytest.raises(RuntimeError, match="deleted"):
                np.asarray(array)
    await change
    assert nothing_left_on(lost, before)
    await run.outputs()
    await server.close()


async def test_thirty_losses_and_arrivals_leave_no_arrays_and_no_threads(programs: Path) -> None:
    server = await start_server(programs, mesh="2x2x2")
    run = Run(server, "reference")
    run.start()
    expected = await run.outputs()
    counts: list[int] = []
    for number in range(30):
        run = Run(server, f"run-{number}", kinds=("greedy", "seeded"))
        run.start()
        await run.reached(5 + number)
        await server.service.preempt(INSTANCES[number % 4], 5.0 if number % 3 else 0.0)
        same(await run.outputs(), expected)
        await restore(server)
        assert not gone(server)
        if number % 10 == 9:
            gc.collect()
            counts.append(len(jax.live_arrays()))
            # pools start threads when they need them, so what counts is that retired pipelines' threads are gone
            threads = [thread for thread in threading.enumerate() if thread.name.startswith("pipeline")]
            assert len(threads) <= 2 * len(server.cluster.pipelines), "threads are left behind"
    assert counts[2] <= counts[0], "arrays are left behind"
    await server.close()


async def test_fused_stages_take_over_in_the_middle_of_requests(programs: Path) -> None:
    threads = set(threading.enumerate())
    server = await start_server(programs, mesh="1x2x2", fuse=True)
    executables = server.cluster.model.executables
    plain = Run(server, "plain")
    plain.start()
    expected = await plain.outputs()
    await asyncio.to_thread(executables.wait_for_background)
    compiled = executables.compiled
    for number in range(3):
        run = Run(server, f"fused-{number}")
        run.start()
        await run.reached(40)
        await server.service.preempt(INSTANCES[number], 0.0 if number else 5.0)
        same(await run.outputs(), expected)
        await restore(server)
    assert executables.compiled == compiled
    await server.close()
    left = set(threading.enumerate()) - threads
    assert not [thread.name for thread in left if thread.name.startswith(("pipeline", "compile", "load"))]
