"""Numbers of a live race, its table, and its JSON, from which the simulator's inputs are read again. Runs nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from spotjax.errors import ConfigError
from spotjax.meshes.instance import InstanceType
from spotjax.meshes.instance_types import VIRTUAL_CPU
from spotjax.meshes.shape import MeshShape
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand
from spotjax.planner.profile import MeasuredProfile
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.workload import RequestTrace, SpotTrace
from spotjax.sim.world import Scenario
from spotjax.tools.live_race import Answer, Run, wrong_tokens
from spotjax.tools.live_trace import Happening, Workload, instance_seconds, spot_trace

FORMAT = 1
"""Version of the JSON."""
DTYPE_BYTES = 4


@dataclass(frozen=True)
class Summary:
    """Numbers of one run; seconds unless said otherwise.

    Requests that did not end count with their age when they were given up, in latencies and in gaps.

    Attributes:
      arrivals, recovery: workload and policy.
      requests: number of them.
      unfinished: those that did not end.
      average, p50, p90, p99: from when a request was due until its end.
      first, first_p99: from when it was due until its first token, average and P99.
      gap: the longest between two tokens of a stream.
      tokens: that came.
      lost, repeated, wrong: tokens that should have come and did not, came again, or are not those of the
        undisturbed service.
      recomputed: running sequences whose KV was computed again.
      loaded: bytes of parameters that were read from the model's files after the start.
      changes: of the mesh.
      instance_seconds: instances were there for, from the first arrival to the end of the run.
      cost: USD for them.
      load: of the machine at the end.
    """

    arrivals: str
    recovery: str
    requests: int
    unfinished: int
    average: float
    p50: float
    p90: float
    p99: float
    first: float
    first_p99: float
    gap: float
    tokens: int
    lost: int
    repeated: int
    wrong: int
    recomputed: int
    loaded: int
    changes: int
    instance_seconds: float
    cost: float
    load: float


def summary(
    run: Run, expected: Mapping[str, Sequence[int]], trace: Sequence[Happening], grace: float, price: float
) -> Summary:
    """What one run comes to.

    Args:
      run: at least one request.
      expected: right tokens by question.
      trace: what happened to the instances.
      grace: seconds of notice.
      price: USD per hour of an instance.
    """
    latencies = [(run.seconds if a.done is None else a.done) - a.arrival for a in run.answers]
    firsts = [(a.times[0] if a.times else run.seconds) - a.arrival for a in run.answers]
    switches = [event for event in run.events if event.kind == "switch" and event.time > 0]
    lost, repeated, wrong = wrong_tokens(run.answers, expected)
    used = instance_seconds(trace, grace, run.seconds)
    p50, p90, p99 = (percentile(latencies, share) for share in (0.5, 0.9, 0.99))
    gap = max(longest_gap(answer, run.seconds) for answer in run.answers)
    return Summary(
        run.arrivals, run.recovery, len(run.answers), sum(a.done is None for a in run.answers),
        statistics.mean(latencies), p50, p90, p99, statistics.mean(firsts), percentile(firsts, 0.99), gap,
        sum(len(a.tokens) for a in run.answers), lost, repeated, wrong,
        sum(int(event.fields.get("recomputed", 0)) for event in switches),
        sum(int(e.fields.get("bytes_loaded", 0)) for e in run.events if e.kind == "precopy" and e.time > 0),
        len(switches), used, used * price / 3600, run.load,
    )  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The value at that share of the sorted values, as SpotServe's scripts take it: no interpolation."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def longest_gap(answer: Answer, end: float) -> float:
    """The longest time without a token between the first and the last, to the end of the run if it did not end."""
    times = [*answer.times, *([end] if answer.done is None and answer.times else [])]
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


def advantage(summaries: Sequence[Summary], arrivals: str) -> float | None:
    """By how much Spotjax's P99 is lower than that of the best baseline; None if one of them did not run."""
    p99 = {s.recovery: s.p99 for s in summaries if s.arrivals == arrivals}
    others = [seconds for recovery, seconds in p99.items() if recovery != "spotjax"]
    return min(others) / p99["spotjax"] if "spotjax" in p99 and others else None


def table(summaries: Sequence[Summary]) -> Table:
    """All runs, one line each."""
    shown = Table(title="the same server, requests and kills; seconds")
    headings = ("arrivals", "recovery", "requests", "avg", "P50", "P90", "P99", "first", "first P99", "gap", "tokens")
    for heading in (*headings, "lost/rep./wrong", "recomputed", "loaded MB", "changes", "USD", "USD/M tokens", "load"):
        shown.add_column(heading, justify="left" if heading in ("arrivals", "recovery") else "right")
    for s in summaries:
        times = (s.average, s.p50, s.p90, s.p99, s.first, s.first_p99, s.gap)
        open_ = f" ({s.unfinished} open)" if s.unfinished else ""
        shown.add_row(
            s.arrivals, s.recovery, f"{s.requests}{open_}", *(f"{t:.2f}" for t in times), str(s.tokens),
            f"{s.lost}/{s.repeated}/{s.wrong}", str(s.recomputed), f"{s.loaded / 1e6:.0f}", str(s.changes),
            f"{s.cost:.4f}", f"{1e6 * s.cost / s.tokens:.2f}" if s.tokens else "",
            f"{s.load:.1f}",
        )  # fmt: skip
    return shown


@dataclass(frozen=True)
class Inputs:
    """What a race was run on, as a simulator takes it; ``scenario`` puts it together.

    Attributes:
      spec: the model.
      kind: what the planner is told of an instance.
      demand: typical requests, and what a replica can do at once, as the server plans with them.
      requests: by kind of arrivals.
      spot: what happened to the instances.
      profile: latencies of a stage on one core; None if none was measured.
      cores: of an instance; None where all shared those of the machine.
      start_seconds: median time from the start of a process until it joined; None if none did.
      load_bandwidth: bytes of parameters per second that an instance reads from the model's files, median of the
        changes that read some; None if none did.
      shape: the first mesh, such as 2x2x1.
    """

    spec: ModelSpec
    kind: InstanceType
    demand: Demand
    requests: Mapping[str, RequestTrace]
    spot: SpotTrace
    profile: MeasuredProfile | None
    cores: float | None
    start_seconds: float | None
    load_bandwidth: float | None
    shape: str


def scenario(inputs: Inputs, arrivals: str) -> Scenario:
    """The race with one kind of arrivals, to be simulated.

    Raises:
      ConfigError: no profile was measured, or no such arrivals ran.
    """
    if inputs.profile is None or arrivals not in inputs.requests:
        raise ConfigError(f"a race with {arrivals} arrivals and a profile is needed to simulate it")
    measured = {"start_seconds": inputs.start_seconds, "checkpoint_bandwidth": inputs.load_bandwidth}
    known = {name: value for name, value in measured.items() if value is not None}
    assumptions = replace(
        Assumptions(), announced_seconds=0.0, engine_start_seconds=0.0, switch_seconds=0.0,
        scale=1 / inputs.cores if inputs.cores is not None else 1.0, **known,
    )  # fmt: skip
    name = f"live race, {arrivals}"
    requests = inputs.requests[arrivals]
    return Scenario(name, inputs.spec, inputs.profile, inputs.kind, inputs.spot, requests, assumptions)


def document(
    facts: Mapping[str, Any],
    cores: float | None,
    config: DecoderConfig,
    memory: int,
    demand: Demand,
    shape: str,
    trace: Sequence[Happening],
    grace: float,
    workloads: Sequence[Workload],
    runs: Sequence[Run],
    summaries: Sequence[Summary],
    measured: Sequence[Mapping[str, float]],
    profile: MeasuredProfile | None,
) -> dict[str, Any]:
    """Everything about a race, as JSON.

    Args:
      facts: machine, versions, settings.
      cores, memory: of an instance; cores are None where all shared those of the machine.
      config, demand: the model, and what the server plans with.
      shape: of the first mesh.
      trace, grace: what happened to instances.
      workloads: of all kinds of arrivals.
      runs, summaries: in the same order.
      measured: seconds of prompts and steps by batch.
      profile: seconds of a stage.
    """
    starts = [seconds for run in runs for seconds in run.starts.values()]
    loads = [  # of all instances of the mesh at once
        float(e.fields["bytes_loaded"]) / float(e.fields["seconds"]) / MeshShape.parse(shape).devices
        for run in runs
        for e in run.events
        if e.kind == "precopy" and e.time > 0 and e.fields.get("bytes_loaded")
    ]
    return {
        "format": FORMAT,
        "facts": dict(facts),
        "cores_per_instance": cores,
        "model": asdict(config),
        "memory": memory,
        "demand": asdict(demand),
        "shape": shape,
        "grace": grace,
        "duration": max((run.seconds for run in runs), default=0.0),
        "trace": [asdict(one) for one in trace],
        "workloads": [
            {
                "arrivals": workload.arrivals,
                "times": workload.times,
                "prompts": [len(question.prompt) for question in workload.asked],
                "outputs": [question.output for question in workload.asked],
            }
            for workload in workloads
        ],
        "measured": {
            "batches": list(measured),
            "start_seconds": statistics.median(starts) if starts else None,
            "load_bandwidth": statistics.median(loads) if loads else None,
        },
        "profile": json.loads(profile.to_json()) if profile is not None else None,
        "results": [asdict(one) for one in summaries],
        "advantage": {w.arrivals: advantage(summaries, w.arrivals) for w in workloads},
        "runs": [asdict(run) for run in runs],
    }


def read_race(path: Path) -> Inputs:
    """The inputs of a race that was written as JSON.

    Raises:
      ConfigError: the file is not one, or of another version.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ConfigError(f"{path} has format {content['format']}, this version reads {FORMAT}")
        trace = [Happening(**one) for one in content["trace"]]
        requests = {
            one["arrivals"]: RequestTrace.of(one["arrivals"], one["times"], one["prompts"], one["outputs"])
            for one in content["workloads"]
        }
        profile, measured = content["profile"], content["measured"]
        return Inputs(
            spec=ModelSpec(msgspec.convert(content["model"], DecoderConfig), dtype_bytes=DTYPE_BYTES),
            kind=replace(VIRTUAL_CPU, memory_bytes=content["memory"]),
            demand=Demand(**content["demand"]),
            requests=requests,
            spot=spot_trace(trace, content["grace"], content["duration"]),
            profile=MeasuredProfile.from_json(json.dumps(profile)) if profile is not None else None,
            cores=content["cores_per_instance"],
            start_seconds=measured["start_seconds"],
            load_bandwidth=measured["load_bandwidth"],
            shape=content["shape"],
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"{path} is not the JSON of a race: {problem!r}") from problem
