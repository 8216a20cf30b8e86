"""Steps of one replica on workers: results in any order, losses at any moment, closer shapes once all have them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from spotjax.engine.batch import Batch, Span
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.structure import Masks
from spotjax.errors import InstanceLost
from spotjax.fleet.remote_pipeline import RECENT_STEPS, RemotePipeline
from spotjax.protocol.steps import MaskHeader, ResultHeader, StepHeader, read_masks, read_step, result_payload
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.controls import Variant
from spotjax.runtime.step import pack_step, step_shape

BUCKETS = Buckets(max_batch=4, prefill_tokens=16, page_size=8, max_positions=512)


class Wire:
    """What was sent to the first stage."""

    def __init__(self, *, fuse: bool = False, stages: int = 3) -> None:
        self.sent: list[tuple[StepHeader, memoryview]] = []
        self.targets: list[str] = []
        self.pipeline = RemotePipeline("1.0", [f"i{n}" for n in range(stages)], BUCKETS, self._send, fuse=fuse)

    def _send(self, target: str, header: StepHeader, payload: Sequence[memoryview]) -> None:
        self.targets.append(target)
        self.sent.append((header, memoryview(b"".join(payload))))

    async def run(self, batch: Batch) -> asyncio.Task[object]:
        task = asyncio.create_task(self.pipeline.run(batch))
        await asyncio.sleep(0)
        return task

    def answer(self, step: int, *tokens: int, ready: bool = False) -> None:
        array = np.zeros((4, 4), np.int32)
        array[: len(tokens), 0] = tokens
        self.pipeline.receive(ResultHeader("1.0", step, 4, 4, ready), memoryview(b"".join(result_payload(array))))


def decode(step: int, *sequences: int, position: int = 9) -> Batch:
    state = RequestState("r", 0, tuple(range(position + 1)), SamplingParams(temperature=0))
    pages = tuple(range(1, 2 + position // 8))
    return Batch(step, tuple(Span(key, (key,), position, pages, state, True) for key in sequences))


def prefill(step: int) -> Batch:
    state = RequestState("r", 0, tuple(range(10)), SamplingParams(temperature=0))
    return Batch(step, (Span(1, tuple(range(10)), 0, (1, 2), state, True),))


async def test_a_step_goes_to_the_first_stage_as_it_would_run_here() -> None:
    wire = Wire()
    assert wire.pipeline.depth == 3
    batch = decode(7, 5, 6)
    running = await wire.run(batch)
    (header, payload), shape = wire.sent[0], step_shape(batch, BUCKETS, fine=False)
    assert header == StepHeader("1.0", 7, 0, shape, Variant.GREEDY, (5, 6), None, ready=False)
    packed, hidden = read_step(header, payload, 16, 512, np.dtype(np.float32))
    expected = pack_step(batch, BUCKETS, shape)
    assert hidden is None
    for array in ("rows", "pages", "controls"):
        np.testing.assert_array_equal(getattr(packed, array), getattr(expected, array))
    wire.answer(7, 50, 60)
    assert {key: drawn.token for key, drawn in (await running).sampled.items()} == {5: 50, 6: 60}


async def test_results_may_come_in_any_order_and_twice() -> None:
    wire = Wire()
    running = [await wire.run(decode(step, step + 10)) for step in range(3)]
    for step in (2, 0, 2, 1, 0, 99):
        wire.answer(step, 100 + step)
    for step, one in enumerate(running):
        assert (await one).sampled[step + 10].token == 100 + step
    wire.answer(1, 5)  # nobody waits for it any more
    assert not wire.pipeline._running


async def test_a_loss_fails_steps_under_way_and_all_later_ones_but_not_what_has_come_back() -> None:
    wire = Wire()
    running = [await wire.run(decode(step, 1)) for step in range(3)]
    wire.answer(0, 42)
    wire.pipeline.lose("instance i1 was lost")
    assert (await running[0]).sampled[1].token == 42
    wire.answer(1, 43)
    for one in running[1:]:
        with pytest.raises(InstanceLost, match="i1 was lost"):
            await one
    with pytest.raises(InstanceLost, match="i1 was lost"):
        await wire.pipeline.run(decode(3, 1))
    assert len(wire.sent) == 3
    assert not wire.pipeline._running


async def test_a_loss_found_out_while_sending_fails_the_step() -> None:
    def send(_: str, header: StepHeader, payload: Sequence[memoryview]) -> None:
        pipeline.lose("instance i0 was lost")

    pipeline = RemotePipeline("1.0", ["i0"], BUCKETS, send, fuse=False)
    with pytest.raises(InstanceLost, match="i0"):
        await pipeline.run(decode(0, 1))


async def test_a_step_that_nobody_waits_for_any_more_leaves_nothing() -> None:
    wire = Wire()
    running = await wire.run(decode(0, 1))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not wire.pipeline._running
    wire.answer(0, 1)


async def test_a_close_fitting_shape_is_used_once_every_stage_said_that_it_is_ready() -> None:
    wire = Wire(fuse=True)
    batch_at = [decode(step, 1, 2, 3, position=150) for step in range(4)]
    common, close = (step_shape(batch_at[0], BUCKETS, fine=fine) for fine in (False, True))
    assert close != common
    for step, ready in enumerate((False, True)):
        running = await wire.run(batch_at[step])
        header = wire.sent[-1][0]
        assert (header.shape, header.want, header.ready) == (common, close, True)
        wire.answer(step, 1, 2, 3, ready=ready)
        await running
    running = await wire.run(batch_at[2])
    header = wire.sent[-1][0]
    assert (header.shape, header.want, header.ready) == (close, None, False)
    wire.answer(2, 1, 2, 3)
    await running
    running = await wire.run(decode(3, 1))  # another shape is another matter
    assert wire.sent[-1][0].want is not None
    wire.answer(3, 1)
    await running


async def test_prefill_and_pipelines_that_do_not_fuse_want_no_other_shapes() -> None:
    for wire, batch in ((Wire(fuse=True), prefill(0)), (Wire(fuse=False), decode(0, 1))):
        running = await wire.run(batch)
        header = wire.sent[0][0]
        assert header.want is None and header.ready is False
        wire.answer(0, 1, ready=True)
        await running
        assert not wire.pipeline._ready


async def test_the_latest_steps_are_remembered_at_shapes_that_everybody_has() -> None:
    wire = Wire(fuse=True)
    for step in range(RECENT_STEPS + 4):
        running = await wire.run(prefill(step) if step % 2 else decode(step, 1))
        wire.answer(step, 1, ready=True)
        await running
    shapes = {shape for shape, _, _ in wire.pipeline.recent}
    assert len(wire.pipeline.recent) == RECENT_STEPS
    assert shapes == {step_shape(batch, BUCKETS, fine=False) for batch in (prefill(0), decode(0, 1))}
    assert all(isinstance(shape, StepShape) for shape in shapes)


def structured(step: int, *sequences: int) -> Batch:
    """A decode step whose rows have masks that nobody has computed yet."""
    return replace(decode(step, *sequences), masks=Future())


async def test_masks_go_to_the_last_stage_once_they_are_computed() -> None:
    wire = Wire()
    batch = structured(7, 5, 6)
    running = await wire.run(batch)
    assert [header.masked for header, _ in wire.sent] == [True] and wire.targets == ["i0"]
    assert batch.masks is not None
    words = np.arange(6, dtype=np.int32).reshape(2, 3)
    batch.masks.set_result(Masks((0, 1), words, {}))
    await asyncio.sleep(0)
    (_, (header, payload)) = wire.sent
    assert (wire.targets, header) == (["i0", "i2"], MaskHeader("1.0", 7, (0, 1)))
    np.testing.assert_array_equal(read_masks(header, payload, 96).words, words)
    wire.answer(7, 1, 2)
    await running


async def test_a_step_that_waits_for_masks_gets_them_even_if_its_pipeline_is_lost() -> None:
    wire, batch = Wire(), structured(0, 1)
    running = await wire.run(batch)
    wire.pipeline.lose("instance i1 is gone")
    with pytest.raises(InstanceLost):
        await running
    running.cancel()
    assert batch.masks is not None
    batch.masks.set_result(Masks((0,), np.zeros((1, 3), np.int32), {}))
    await asyncio.sleep(0)
    assert wire.targets == ["i0", "i2"], "or the stage would wait for ever"


async def test_masks_that_cannot_be_computed_at_all_are_an_error_of_the_controller() -> None:
    wire, batch = Wire(), structured(0, 1)
    running = await wire.run(batch)
    assert batch.masks is not None
    batch.masks.set_exception(MemoryError("no room"))
    with pytest.raises(MemoryError):
        await running
