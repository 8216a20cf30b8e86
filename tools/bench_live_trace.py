"""The same server, model, requests and kills in three recovery policies: ``python -m spotjax.tools.bench_live_trace``.

Real processes on this machine: a controller, and a worker for every instance. A trace says when instances are killed,
get notice, and come; requests come by a Poisson process and in bursts, whatever became of those before. For each policy
(``spotjax``, ``reparallelization``, ``rerouting``) a service of its own goes through the same, one after another. Every
token is compared with that of an undisturbed service.

An instance is a process with a fraction of a core (``--cores``), so that losing one loses computing power; where
control groups cannot be made, all share the cores, and it is said so. Models of this size would be read from memory in
no time; ``--load-seconds`` has every instance, in all policies, read as slowly as if the model filled it: GPT-20B on
four T4 at 0.7 GB/s takes 36 s, two and a half times as long as one of its requests. What a simulator needs to be run on
the same is measured, too, and written to ``--json`` (``spotjax.tools.race_results.read_race`` reads it).

``--trace FILE`` has lines of ``SECONDS join|leave|kill NAME``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError
from spotjax.fleet.change import Recovery
from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.models.catalog import open_model
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import memory_need
from spotjax.planner.demand import Demand
from spotjax.sizing import planning_for, resolve_limits
from spotjax.tools.bench_failover import machine
from spotjax.tools.cpu_limits import cpu_limits
from spotjax.tools.live_race import Run, Setup, profile, race, reference
from spotjax.tools.live_trace import (
    DEFAULT_TRACE,
    Arrivals,
    Happening,
    Workload,
    arrival_times,
    first,
    parse_trace,
    questions,
)
from spotjax.tools.race_results import DTYPE_BYTES, Summary, advantage, document, summary, table
from spotjax.tools.random_model import random_config, write_random_model

GOAL = 2.4
"""Times by which the P99 is to be lower than that of the best baseline."""
PAGE_SIZE, PREFILL_TOKENS = 16, 128
console = Console(width=None if sys.stdout.isatty() else 200)


async def bench(arguments: argparse.Namespace, setup: Setup, trace: Sequence[Happening]) -> dict[str, Any]:
    """The whole race, as JSON."""
    a = arguments
    model = open_model(str(setup.model)).checkpoint.spec.config
    asked = questions(a.questions, (a.prompt[0], a.prompt[1]), (a.output[0], a.output[1]), model.vocab, a.seed)
    workloads = [
        Workload.drawn(kind, arrival_times(kind, a.rate, a.seconds, a.cv, a.seed), asked, a.seed) for kind in a.arrivals
    ]
    with console.status("latencies of an instance"):
        measured_profile = await profile(setup) if a.profile else None
    with console.status("an undisturbed service"):
        expected, measured, shape = await reference(setup, first(trace), asked, a.batches)
    console.log(f"first mesh {shape}; by batch: {measured}")
    runs: list[Run] = []
    summaries: list[Summary] = []
    for workload in workloads:
        for recovery in a.recovery:
            with console.status(f"{workload.arrivals}, {recovery}"):
                runs.append(await race(setup, recovery, trace, workload, a.patience))
            summaries.append(summary(runs[-1], expected, trace, setup.grace, a.price))
            console.log(f"{workload.arrivals}, {recovery}: P99 {summaries[-1].p99:.2f} s, load {runs[-1].load:.1f}")
    facts = machine(a.seed) | {
        "jaxlib": version("jaxlib"),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(a).items()},
    }
    console.print(table(summaries))
    for workload in workloads:
        if (times := advantage(summaries, workload.arrivals)) is not None:
            verdict = "met" if times >= GOAL else "missed"
            console.print(
                f"{workload.arrivals}: P99 is {times:.2f} times lower than the best baseline's; {GOAL} {verdict}"
            )
    console.print(facts)
    demand = planned_demand(setup.model, setup.max_batch, setup.max_positions)
    cores = a.cores if setup.limits is not None else None
    return document(
        facts, cores, model, setup.memory, demand, shape, trace, setup.grace, workloads, runs, summaries, measured,
        measured_profile,
    )  # fmt: skip


def planned_demand(model: Path, max_batch: int, positions: int) -> Demand:
    """What the server plans with."""
    spec = ModelSpec(open_model(str(model)).checkpoint.spec.config, dtype_bytes=DTYPE_BYTES)
    config = ServeConfig(max_batch=max_batch, max_model_len=positions, prefill_tokens=PREFILL_TOKENS)
    return planning_for(config, spec, resolve_limits(config, spec)[0]).demand


def instance_memory(model: Path, max_batch: int, positions: int, stages: int) -> int:
    """Bytes of an instance of which so many hold a replica, and fewer do not.

    Raises:
      ConfigError: fewer would.
    """
    spec = ModelSpec(open_model(str(model)).checkpoint.spec.config, dtype_bytes=DTYPE_BYTES)
    demand = planned_demand(model, max_batch, positions)
    enough, fewer = (
        memory_need(spec, MeshShape(1, p, 1), split_layers(spec.config.layers, p), demand).total
        for p in (stages, max(1, stages - 1))
    )
    memory = int(enough * 1.02)
    if stages > 1 and memory >= fewer:
        raise ConfigError(f"--stages {stages}: {stages - 1} instances of {memory} bytes would hold this model, too")
    return memory


def read_bandwidth(model: Path, stages: int, seconds: float) -> int:
    """Bytes per second at which an instance reads its part of the parameters in that time; 0, no limit, for no time."""
    spec = open_model(str(model)).checkpoint.spec
    return int(spec.parameter_bytes / stages / seconds) if seconds else 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="what to serve, a directory; by default random weights of --width and --layers")
    add("--width", type=int, default=512)
    add("--layers", type=int, default=10)
    add("--stages", type=int, default=3, help="instances that a replica needs; rerouting makes its replicas of as many")
    add("--recovery", nargs="+", choices=get_args(Recovery), default=list(get_args(Recovery)))
    add("--arrivals", nargs="+", choices=get_args(Arrivals), default=list(get_args(Arrivals)))
    add("--rate", type=float, default=1.0, help="requests per second")
    add("--cv", type=float, default=3.0, help="coefficient of variation of the gaps of bursty arrivals")
    add("--seconds", type=float, default=60.0, help="in which requests come")
    add("--patience", type=float, default=90.0, help="seconds after the last arrival until the rest is given up")
    add("--trace", type=Path, help="what happens to the instances; a minute of our own by default")
    add("--grace", type=float, default=6.0, help="seconds of notice")
    add("--cores", type=float, default=0.25, help="of each instance; 0 for no limit")
    add("--prompt", type=int, nargs=2, default=[256, 480], metavar=("LEAST", "MOST"), help="tokens")
    add("--output", type=int, nargs=2, default=[16, 40], metavar=("LEAST", "MOST"), help="tokens")
    add("--questions", type=int, default=24, help="different requests")
    add("--batches", type=int, nargs="+", default=[1, 4, 8], help="for which prompts and steps are measured")
    add("--max-batch", type=int, default=16)
    add("--load-seconds", type=float, default=10.0, help="an instance reads its part of the model in; 0: at full speed")
    add("--price", type=float, default=1.9, help="USD per hour of an instance")
    add("--no-profile", dest="profile", action="store_false", help="measure no stages for the simulator")
    add("--seed", type=int, default=0)
    add("--logs", type=Path, help="new directory to keep all logs in")
    add("--programs", type=Path, help="directory of compiled programs, to keep them for the next race")
    add("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        text = arguments.trace.read_text() if arguments.trace else DEFAULT_TRACE
        trace = parse_trace(text, str(arguments.trace or "the trace"))
    except (OSError, ConfigError) as problem:
        raise SystemExit(str(problem)) from problem
    with contextlib.ExitStack() as stack:
        directory = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="race-")))
        limits = stack.enter_context(cpu_limits(arguments.cores))
        if arguments.cores and limits is None:
            console.print("no control groups here: all instances share the cores, losing one costs no computing power")
        model = arguments.model or directory / "model"
        if arguments.model is None:
            write_random_model(model, random_config(arguments.width, arguments.layers), arguments.seed)
        positions = -(-(arguments.prompt[1] + arguments.output[1]) // PAGE_SIZE) * PAGE_SIZE
        memory = instance_memory(model, arguments.max_batch, positions, arguments.stages)
        setup = Setup(
            directory, model, arguments.programs or directory / "programs", memory, arguments.stages,
            arguments.max_batch, positions, PREFILL_TOKENS, arguments.grace, limits,
            read_bandwidth(model, arguments.stages, arguments.load_seconds),
        )  # fmt: skip
        results = asyncio.run(bench(arguments, setup, trace))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
