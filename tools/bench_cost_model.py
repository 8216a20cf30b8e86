"""Compares predicted latencies with measured ones on this machine's device: the shipped model and random ones.

    python -m spotjax.tools.bench_cost_model --json cost_model.json

Takes 98 s on two cores at a load of 4, less on idle ones, most of it compiling. Two of the three models are measured
unless ``--models tiny 11M 58M`` asks for all.

Three predictions: the analytic roofline with this device's measured peaks; a profile fitted to stages of at most half
of the layers and at most four, for each of its samples when that is left out; and the same profile for the whole model,
which it has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from spotjax.meshes.instance import InstanceType
from spotjax.models.catalog import open_model
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import Roofline
from spotjax.planner.latency import LatencyModel, Stage
from spotjax.planner.profile import Sample
from spotjax.tools.record_profile import measure_stage, record

MODELS = {
    "tiny": ModelSpec(open_model("tiny").checkpoint.spec.config),
    "11M": ModelSpec(DecoderConfig(4096, 256, 8, 8, 4, 32, 1024, tied_embeddings=True)),
    "58M": ModelSpec(DecoderConfig(13_056, 640, 10, 10, 5, 64, 1920, tied_embeddings=True)),
}
"""The shipped model, and Llama decoders of other sizes. All in float32 with random parameters: only shapes matter."""

MEASURED = ("tiny", "58M")
"""Those that are measured if nothing else is asked for."""


def best_seconds(call: Callable[[], jax.Array], repeats: int = 30) -> float:
    """Shortest of several calls."""
    jax.block_until_ready(call())
    laps = []
    for _ in range(repeats):
        before = time.perf_counter()
        jax.block_until_ready(call())
        laps.append(time.perf_counter() - before)
    return min(laps)


def this_device() -> InstanceType:
    """This machine's device with the peaks that large products and large sums reach."""
    square = jnp.ones((1024, 1024), jnp.float32)
    long = jnp.ones(1 << 26, jnp.float32)
    flops = 2 * 1024**3 / best_seconds(lambda: square @ square)
    total = jax.jit(jnp.sum)
    bandwidth = 4 * (1 << 26) / best_seconds(lambda: total(long))
    return InstanceType("here", 1, 2**40, flops, bandwidth, 1e10, 1e10)


def errors(model: LatencyModel, samples: list[Sample] | tuple[Sample, ...]) -> dict[str, float]:
    """Median and 90 % of the absolute relative errors, and the median of the signed ones."""
    signed = [model.stage_seconds(s.stage, s.tensor, s.work) / s.seconds - 1 for s in samples]
    sizes = sorted(map(abs, signed))
    return {"median": median(sizes), "p90": sizes[int(0.9 * (len(sizes) - 1))], "bias": median(signed)}


def compare(name: str, spec: ModelSpec, kind: InstanceType, repeats: int) -> dict[str, Any]:
    """All predictions for one model."""
    layers = spec.config.layers
    profile = record(name, spec, [1], min(4, layers // 2), "float32", repeats, lambda _: None)
    whole = list(measure_stage(spec, tuple(jax.devices()[:1]), Stage(layers, True, True), "float32", repeats))
    roofline = Roofline(spec, kind)
    return {
        "parameters": spec.parameter_bytes // spec.dtype_bytes,
        "roofline, stages": errors(roofline, profile.samples),
        "roofline, whole model": errors(roofline, whole),
        "profile, left-out samples": {"median": profile.held_out_error()},
        "profile, whole model": errors(profile, whole),
        "whole model": [
            {
                "work": sample.work._asdict(),
                "measured": sample.seconds,
                "roofline": roofline.stage_seconds(sample.stage, 1, sample.work),
                "profile": profile.stage_seconds(sample.stage, 1, sample.work),
            }
            for sample in whole
        ],
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report."""
    console = Console(width=120)
    device = report["device"]
    console.print(f"measured peaks: {device['flops'] / 1e9:.0f} GFLOP/s, {device['memory_bandwidth'] / 1e9:.1f} GB/s")
    table = Table(title="relative error of predicted latencies")
    for heading in ("model", "prediction", "median", "90 %", "bias"):
        table.add_column(heading, justify="left" if heading in ("model", "prediction") else "right")
    for name, rows in report["models"].items():
        for prediction, error in rows.items():
            if isinstance(error, dict):
                shown = [f"{100 * error[part]:.0f} %" if part in error else "" for part in ("median", "p90", "bias")]
                table.add_row(name, prediction, *shown)
    console.print(table)
    table = Table(title="whole models, milliseconds")
    for heading in ("model", "sequences", "tokens", "positions read", "measured", "roofline", "profile"):
        table.add_column(heading, justify="right")
    for name, rows in report["models"].items():
        for row in rows["whole model"]:
            work = [str(row["work"][part]) for part in ("sequences", "tokens", "cached")]
            times = [f"{1000 * row[part]:.2f}" for part in ("measured", "roofline", "profile")]
            table.add_row(name, *work, *times)
    console.print(table)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, metavar="COUNT", help="calls that the shortest is taken of")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MEASURED), help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    kind = this_device()
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.machine()},
        "device": {"flops": kind.flops, "memory_bandwidth": kind.memory_bandwidth},
        "models": {name: compare(name, MODELS[name], kind, arguments.repeats) for name in arguments.models},
    }
    show(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
