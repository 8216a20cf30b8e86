"""What one side packs into a frame the other side reads, bit for bit, and nothing of a wrong size is taken."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.protocol.steps import (
    ALIGNMENT,
    ResultHeader,
    StepHeader,
    read_result,
    read_step,
    result_payload,
    step_payload,
)
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant, controls_width
from spotjax.runtime.step import PackedStep

DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
keys = st.lists(st.integers(0, 2**63 - 1), max_size=5).map(tuple)
shapes = st.builds(StepShape, st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
headers = st.builds(
    StepHeader,
    pipeline=st.text(),
    step=st.integers(0, 2**63 - 1),
    stage=st.integers(0, 8),
    shape=shapes,
    variant=st.sampled_from(Variant),
    sequences=keys,
    want=st.none() | shapes,
    ready=st.booleans(),
)
results = st.builds(
    ResultHeader, st.text(), st.integers(0, 2**63 - 1), st.integers(1, 9), st.integers(1, 50), st.booleans()
)


def step(header: StepHeader, max_positions: int, seed: int) -> PackedStep:
    """Random numbers in the header's shape."""
    shape, generator = header.shape, np.random.default_rng(seed)
    widths = (2 + shape.span, shape.pages, controls_width(header.variant, max_positions))
    arrays = [generator.integers(-(2**31), 2**31, (shape.rows, width)).astype(np.int32) for width in widths]
    return PackedStep(shape, header.variant, *arrays)


def hidden(header: StepHeader, width: int, dtype: np.dtype, seed: int) -> np.ndarray | None:
    if header.stage == 0:
        return None
    values = np.random.default_rng(seed).normal(size=(header.shape.rows, header.shape.span, width))
    return values.astype(dtype)


def received(pieces: tuple[memoryview, ...]) -> memoryview:
    """One block of memory that starts at a multiple of ALIGNMENT, as a connection delivers it."""
    content = b"".join(pieces)
    memory = np.zeros(len(content) + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    block = memory.data[begin : begin + len(content)]
    block[:] = content
    return block


@given(frame=headers | results)
def test_headers_survive_the_wire(frame: StepHeader | ResultHeader) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=StepHeader | ResultHeader) == frame


@given(header=headers, width=st.integers(1, 33), max_positions=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_a_step_survives_the_wire_without_a_copy(
    header: StepHeader, width: int, max_positions: int, dtype: np.dtype, seed: int
) -> None:
    sent, activations = step(header, max_positions, seed), hidden(header, width, dtype, seed)
    payload = received(step_payload(sent, activations))
    found, arrived = read_step(header, payload, width, max_positions, dtype)
    assert (found.shape, found.variant) == (sent.shape, sent.variant)
    pairs = [(sent.rows, found.rows), (sent.pages, found.pages), (sent.controls, found.controls)]
    assert (activations is None) == (arrived is None) == (header.stage == 0)
    if activations is not None and arrived is not None:
        pairs.append((activations, arrived))
    memory = np.frombuffer(payload, np.uint8)
    for before, after in pairs:
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.tobytes() == before.tobytes()
        assert np.shares_memory(after, memory) and after.ctypes.data % ALIGNMENT == 0


@given(header=headers, change=st.sampled_from([-ALIGNMENT, -1, 1, ALIGNMENT]), stage=st.sampled_from([0, 1]))
def test_a_payload_of_the_wrong_size_is_refused(header: StepHeader, change: int, stage: int) -> None:
    header = msgspec.structs.replace(header, stage=stage)
    content = b"".join(step_payload(step(header, 8, 0), hidden(header, 4, DTYPES[0], 0)))
    wrong = memoryview((content + bytes(ALIGNMENT))[: len(content) + change])
    with pytest.raises(ValueError, match=f"payload has {len(content) + change} bytes, .* takes {len(content)}"):
        read_step(header, wrong, 4, 8, DTYPES[0])


@given(header=headers)
def test_hidden_vectors_must_come_exactly_after_the_first_stage(header: StepHeader) -> None:
    first, later = (msgspec.structs.replace(header, stage=stage) for stage in (0, 1))
    for sender, receiver in ((first, later), (later, first)):
        payload = received(step_payload(step(sender, 8, 0), hidden(sender, 4, DTYPES[0], 0)))
        with pytest.raises(ValueError, match="payload has"):
            read_step(receiver, payload, 4, 8, DTYPES[0])


def test_an_array_that_is_not_contiguous_is_sent_as_what_it_shows() -> None:
    header = StepHeader("pipeline", 0, 1, StepShape(3, 2, 1), Variant.GREEDY, (1,), None, True)
    activations = np.arange(36, dtype=np.float32).reshape(3, 2, 6)[:, :, ::2]
    payload = received(step_payload(step(header, 8, 0), activations))
    _, arrived = read_step(header, payload, 3, 8, DTYPES[0])
    np.testing.assert_array_equal(arrived, activations)


@given(header=results, seed=st.integers(0, 2**32 - 1))
def test_a_result_survives_the_wire(header: ResultHeader, seed: int) -> None:
    sent = np.random.default_rng(seed).integers(-(2**31), 2**31, (header.rows, header.columns)).astype(np.int32)
    payload = received(result_payload(sent))
    found = read_result(header, payload)
    assert found.dtype == np.int32 and np.shares_memory(found, np.frombuffer(payload, np.uint8))
    np.testing.assert_array_equal(found, sent)
    with pytest.raises(ValueError, match="payload has"):
        read_result(header, payload[:-1])


def test_steps_are_read_and_written_without_jax() -> None:
    code = "import sys, spotjax.protocol.steps; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
