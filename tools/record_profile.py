"""Measures stages of a model on this machine's devices, with random parameters. What ``spotjax profile`` runs.

The stages are those that serve, ``runtime.stage.Stage``, fused as they are after warm-up; shapes are the padded ones
that steps run at, so that what a step costs is measured and not what it would cost at its exact size.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.errors import ConfigError
from spotjax.meshes.sharding import array_sharding, stacked_shape, stage_mesh
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.planner.latency import Stage as StageKind
from spotjax.planner.latency import Work
from spotjax.planner.profile import MeasuredProfile, Sample
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.stage import Stage

PAGE_SIZE = 16
BATCHES = (1, 4, 8)
CONTEXTS = (128, 512)
PROMPTS = (16, 64, 256)


def record(
    name: str,
    spec: ModelSpec,
    tensors: Sequence[int],
    layers: int,
    dtype: str,
    repeats: int,
    tell: Callable[[str], object],
) -> MeasuredProfile:
    """Measures prompts and decode steps at several sizes, for stages of several depths and every tensor degree.

    Args:
      name: of the model, for people.
      spec: its shapes.
      tensors: degrees; there must be as many devices.
      layers: most layers of a measured stage.
      dtype: of parameters, activations and KV.
      repeats: calls that the shortest is taken of.
      tell: is told in a few words what is being measured.

    Raises:
      ConfigError: too few devices, or the model has no such tensor degree.
    """
    devices = jax.devices()
    samples: list[Sample] = []
    for tensor in tensors:
        if tensor > len(devices) or spec.config.heads % tensor:
            raise ConfigError(
                f"tensor degree {tensor} needs as many devices, here are {len(devices)}, and must divide the "
                f"{spec.config.heads} query heads"
            )
        for stage in stages(min(layers, spec.config.layers)):
            tell(f"tensor degree {tensor}, stage of {stage.layers} layers{' with logits' if stage.last else ''}")
            samples += measure_stage(spec, tuple(devices[:tensor]), stage, dtype, repeats)
    hop_latency, hop_bandwidth = _measure_hop(devices)
    as_int8 = "" if spec.quantization == "none" else f", matrices in {spec.quantization}"
    return MeasuredProfile(
        model=name,
        hardware=f"{devices[0].device_kind} ({platform.machine()}), {dtype}{as_int8}",
        samples=tuple(samples),
        hop_latency=hop_latency,
        hop_bandwidth=hop_bandwidth,
        token_bytes=spec.config.width * jnp.dtype(dtype).itemsize,
    )


def stages(most: int) -> Iterator[StageKind]:
    """Stages of one layer and of ``most``, at the front of a pipeline and as the whole of it."""
    for count in sorted({1, max(1, most // 2), most}):
        yield StageKind(count, first=True, last=False)
    for count in sorted({1, most}):
        yield StageKind(count, first=True, last=True)


def works() -> Iterator[tuple[StepShape, Work]]:
    """Decode steps and prompts, as padded shapes and as work."""
    for batch in BATCHES:
        for context in CONTEXTS:
            yield StepShape(batch, 1, -(-context // PAGE_SIZE)), Work.decode(batch, context)
    for prompt in PROMPTS:
        yield StepShape(1, prompt, -(-prompt // PAGE_SIZE)), Work.prefill(prompt)


def measure_stage(spec: ModelSpec, devices: Devices, kind: StageKind, dtype: str, repeats: int) -> Iterator[Sample]:
    """Measures one stage at every size of ``works``."""
    pages = 1 + max(BATCHES) * -(-max(CONTEXTS) // PAGE_SIZE)
    config = replace(spec.config, layers=kind.layers)
    small = ModelSpec(config, jnp.dtype(dtype).itemsize, spec.quantization)
    model = CompiledModel(small, pages, PAGE_SIZE, max(CONTEXTS), dtype)
    stage = Stage(
        model, devices, (0, kind.layers), first=kind.first, last=kind.last,
        parameters=_random_parameters(model, devices),
    )  # fmt: skip
    stage.pages = {layer: stage.empty_pages() for layer in range(kind.layers)}
    try:
        for shape, work in works():
            yield Sample(kind, len(devices), work, _time(stage, shape, work, repeats))
    finally:
        model.executables.close()


def _random_parameters(model: CompiledModel, devices: Devices) -> dict[str, jax.Array]:
    mesh, chance = stage_mesh(devices), np.random.default_rng(0)

    def content(array: ArraySpec) -> np.ndarray:
        dtype = model.parameter_dtype(array.name)
        spread = 40 if dtype == np.int8 else 0.02
        shape = stacked_shape(array, model.spec, len(devices))
        return (spread * chance.standard_normal(shape, np.float32)).astype(dtype)

    return {
        array.name: jax.device_put(content(array), array_sharding(array, model.spec, mesh))
        for array in model.spec.parameters
    }


def _time(stage: Stage, shape: StepShape, work: Work, repeats: int) -> float:
    """Shortest seconds of a call, compiled and warm: what else runs on the machine only makes it longer."""
    length = work.tokens // work.sequences
    start = work.cached // work.sequences - length if length == 1 else 0
    rows = np.zeros((shape.rows, 2 + shape.span), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2:] = start, length, 1
    pages = 1 + np.arange(shape.rows * shape.pages, dtype=np.int32).reshape(shape.rows, shape.pages)

    def call() -> None:
        jax.block_until_ready(stage.run(shape, rows, pages, None))

    _fuse(stage, shape)
    for _ in range(2):
        call()
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def _fuse(stage: Stage, shape: StepShape) -> None:
    """Waits until the stage runs as one executable, as it does after warm-up."""
    patience = time.monotonic() + 120
    while not stage.has_block(shape) and time.monotonic() < patience:
        time.sleep(0.01)


def _measure_hop(devices: Sequence[jax.Device]) -> tuple[float, float]:
    """Latency and bandwidth of a copy between two devices; between one and itself where there is no other."""
    source, target = devices[0], devices[-1]
    seconds = []
    sizes = (1 << 10, 1 << 24)
    for size in sizes:
        array = jax.device_put(np.zeros(size, np.uint8), source)
        laps = []
        for _ in range(9):
            before = time.perf_counter()
            jax.block_until_ready(jax.device_put(array, target, may_alias=False))
            laps.append(time.perf_counter() - before)
        seconds.append(min(laps))
    bandwidth = (sizes[1] - sizes[0]) / max(seconds[1] - seconds[0], 1e-9)
    return seconds[0], bandwidth
