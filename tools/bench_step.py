"""How long the compiled functions of one step take, by part, and how close that comes to the memory's bandwidth.

``python -m spotjax.tools.bench_step`` runs decode steps at batch 1, 4, 8, 16 and 32 and a prefill of one prompt on one
device, without scheduler, requests or sampling parameters: a whole pipeline stage, called as the engine calls it.
Models are SmolLM2-135M and a Llama of 58 M parameters (width 512, 8 layers, vocabulary 32000, untied), or others of the
catalog; weights are drawn at random (sigma 0.05), since speed does not depend on them.

All configurations are compiled first and then run in turns, ``--repeats`` times, so that a change of the machine's load
meets all of them. Columns: wall time of a step (median, least), its processor time (least, over all threads: the figure
to compare on a busy machine), wall time of its parts (least), the bytes that it must read (parameters once, and the KV
of all contexts), these over the median and least time, and the latter's share of the bandwidth that the memory gives.
That is the best of as many readings as there are repeats, taken in between: the dot product of a 512 MiB array with
itself, one part for each core. With ``--by-layer`` layers are called one by one, as they are until a stage is compiled
whole. Prints tables; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from spotjax.meshes.sharding import array_sharding, stacked_shape, stage_mesh
from spotjax.models.catalog import open_model
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.runtime.attention.xla import XlaAttention
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.controls import Variant, controls_width
from spotjax.runtime.native.choice import KernelSetting, attention_of, choose_kernels, products_of
from spotjax.runtime.stage import Stage
from spotjax.tools.bench_engine import machine, table

PAGE_SIZE = 16
LLAMA_58M = DecoderConfig(vocab=32000, width=512, layers=8, heads=8, kv_heads=8, head_size=64, mlp=1376)
PARTS = ("put", "embed", "layers", "logits", "sample", "read")
console = Console()


def config_of(name: str) -> DecoderConfig:
    """Sizes of a model: ``58M``, or a model of the catalog."""
    return LLAMA_58M if name == "58M" else open_model(name).checkpoint.spec.config


class Bandwidth:
    """Reads a large array with all cores."""

    def __init__(self) -> None:
        self._parts = np.array_split(np.ones(1 << 27, np.float32), os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(len(self._parts))

    def measure(self) -> float:
        """Bytes per second."""
        begin = time.perf_counter()
        list(self._threads.map(lambda part: np.dot(part, part), self._parts))
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - begin)


@dataclass
class Timings:
    """Seconds of every repetition of one step."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})


class StepRunner:
    """A whole model as one stage, and steps through it at any shape.

    Args:
      config: of the model.
      positions: that sequences can have.
      batch: most sequences at once.
      seed: of the weights.
      kernels: what computes products and attention.
      fused: all layers as one executable, else one call for each layer.
    """

    def __init__(
        self, config: DecoderConfig, positions: int, batch: int, seed: int, kernels: KernelSetting, *, fused: bool
    ) -> None:
        devices, self._spec = (jax.devices()[0],), ModelSpec(config)
        pages, native = 1 + batch * -(-positions // PAGE_SIZE), choose_kernels(kernels, devices[0])
        attention = attention_of(native, XlaAttention(config.head_size, PAGE_SIZE), "auto")
        self.model = CompiledModel(
            self._spec, pages, PAGE_SIZE, positions, jnp.float32, attention=attention, products=products_of(native)
        )
        mesh, chance = stage_mesh(devices), np.random.default_rng(seed)
        parameters = {
            array.name: jax.device_put(
                chance.standard_normal(stacked_shape(array, self._spec, 1), np.float32) * np.float32(0.05),
                array_sharding(array, self._spec, mesh),
            )
            for array in self._spec.parameters
        }
        self._stage = Stage(
            self.model, devices, (0, config.layers), first=True, last=True, parameters=parameters
        )  # fmt: skip
        self._stage.pages = {layer: self._stage.empty_pages() for layer in range(config.layers)}
        self._device, self._fused, self._positions = devices[0], fused, positions

    def prepare(self, shape: StepShape) -> None:
        """Compiles all that steps of this shape run, and runs one."""
        if self._fused and not self._stage.has_block(shape):
            self.model.executables.wait_for_background()
        self.run(shape, shape.span)

    def run(self, shape: StepShape, context: int) -> None:
        """One step whose rows reach up to ``context`` positions, as the engine runs it."""
        self._sampled(shape, self._stage.run(shape, *self._input(shape, context), None))

    def time(self, shape: StepShape, context: int, into: Timings) -> None:
        """Times one step, then the same once more part by part, waiting for each."""
        rows, pages = self._input(shape, context)
        processor, begin = time.process_time(), time.perf_counter()
        self._sampled(shape, self._stage.run(shape, rows, pages, None))
        into.wall.append(time.perf_counter() - begin)
        into.processor.append(time.process_time() - processor)
        stage, model, devices = self._stage, self.model, self._stage.devices

        def part(name: str, work: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            result = jax.block_until_ready(work())
            into.parts[name].append(time.perf_counter() - begin)
            return result

        embed, logits = model.embed(devices, shape.rows, shape.span), model.logits(devices, shape.rows, shape.span)
        step = part("put", lambda: stage._step_input(rows, pages))
        hidden = part("embed", lambda: embed(stage._inputs, step.rows))
        hidden = part("layers", lambda: stage._run_layers(shape, hidden, step))
        scores = part("logits", lambda: logits(stage._outputs, hidden, step.rows))
        drawn = part("sample", lambda: self._sample(shape, scores))
        part("read", lambda: np.asarray(drawn))

    def _sampled(self, shape: StepShape, logits: jax.Array) -> np.ndarray:
        return np.asarray(self._sample(shape, logits))

    def _sample(self, shape: StepShape, logits: jax.Array) -> Any:
        controls = np.zeros((shape.rows, controls_width(Variant.GREEDY, self._positions)), np.int32)
        sample = self.model.sample(self._device, Variant.GREEDY, shape.rows)
        result, _ = sample(logits.addressable_shards[0].data, jax.device_put(controls, self._device))
        return result

    def _input(self, shape: StepShape, context: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.ones((shape.rows, 2 + shape.span), np.int32)
        rows[:, 0], rows[:, 1] = context - shape.span, shape.span
        return rows, 1 + np.arange(shape.rows * shape.pages, dtype=np.int32).reshape(shape.rows, shape.pages)

    def bytes_read(self, shape: StepShape, context: int) -> int:
        """What a step must read: all parameters but the rows of an untied embedding, and the keys and values of its
        contexts."""
        config = self._spec.config
        once = sum(
            array.size for array in self._spec.parameters
            if array.name not in self._spec.inputs or array.name in self._spec.outputs
        )  # fmt: skip
        before = context - shape.span
        kv = 2 * shape.rows * before * config.layers * config.kv_heads * config.head_size
        return 4 * (once + kv)


def measure(name: str, arguments: argparse.Namespace, bandwidth: Bandwidth) -> list[dict[str, Any]]:
    """One row for every configuration of one model."""
    context, prompt = arguments.context, arguments.prompt
    cases = [(batch, 1, context) for batch in arguments.batch] + ([(1, prompt, prompt)] if prompt else [])
    runner = StepRunner(
        config_of(name), max(context, prompt), max(arguments.batch), arguments.seed, arguments.cpu_kernels,
        fused=not arguments.by_layer,
    )  # fmt: skip
    shapes = [StepShape(batch, span, -(-reach // PAGE_SIZE)) for batch, span, reach in cases]
    timings, read = [Timings() for _ in cases], []
    try:
        for shape in shapes:
            runner.prepare(shape)
        for _ in range(arguments.repeats):
            read.append(bandwidth.measure())
            for shape, (_, _, reach), into in zip(shapes, cases, timings, strict=True):
                runner.time(shape, reach, into)
    finally:
        runner.model.executables.close()
    rows = []
    for shape, (batch, span, reach), taken in zip(shapes, cases, timings, strict=True):
        needed, median = runner.bytes_read(shape, reach), statistics.median(taken.wall)
        rows.append(
            {
                "model": name,
                "step": "decode" if span == 1 else f"prefill {span}",
                "batch": batch,
                "ms": 1e3 * median,
                "least_ms": 1e3 * min(taken.wall),
                "processor_ms": 1e3 * min(taken.processor),
                **{f"{part}_ms": 1e3 * min(seconds) for part, seconds in taken.parts.items()},
                "tokens_per_s": batch * span / median,
                "MB_read": needed / 1e6,
                "GB_per_s": needed / median / 1e9,
                "least_GB_per_s": needed / min(taken.wall) / 1e9,
                "of_bandwidth": needed / min(taken.wall) / max(read),
                "bandwidth_GB_per_s": max(read) / 1e9,
            }
        )
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct", "58M"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=160, help="positions of every sequence that decodes")
    parser.add_argument("--prompt", type=int, default=128, help="positions of the prefill; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cpu-kernels", choices=get_args(KernelSetting), default="auto", help="as of a server")
    parser.add_argument("--by-layer", action="store_true", help="one call for each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(given)
    bandwidth, rows = Bandwidth(), []
    for name in arguments.models:
        found = measure(name, arguments, bandwidth)
        console.print(table(f"{name} float32, contexts of {arguments.context}", [_short(row) for row in found]))
        console.print(f"memory bandwidth {found[0]['bandwidth_GB_per_s']:.1f} GB/s")
        rows += found
    about = {
        **machine(),
        "cpu_kernels": arguments.cpu_kernels,
        "seed": arguments.seed,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    console.print(about)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """What fits on a line."""
    left_out = {"model", "put_ms", "read_ms", "bandwidth_GB_per_s", "least_GB_per_s"}
    return {name: value for name, value in row.items() if name not in left_out}


if __name__ == "__main__":
    main()
