"""What ``spotjax simulate`` is fed with, as its arguments spell it: recorded files, named traces and generators."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from spotjax.errors import ConfigError
from spotjax.sim.assumptions import Assumptions

if TYPE_CHECKING:
    from spotjax.sim.systems.registry import RequiredRate
    from spotjax.sim.traces.scenarios import Segment
    from spotjax.sim.workload import RequestTrace, SpotTrace
    from spotjax.sim.world import Scenario

_LENGTHS = {"prompt": 512.0, "output": 128.0, "prompt_cv": 0.0, "output_cv": 0.0}
REQUEST_GENERATORS: Mapping[str, Mapping[str, float | None]] = {
    "gamma": {"rate": None, "cv": None, **_LENGTHS},
    "poisson": {"rate": None, **_LENGTHS},
    "artifact": {"rate": None, "cv": 6.0, **_LENGTHS},
    "fluctuating": {"cv": 0.0, **_LENGTHS},
}
"""Parameters of each by name, with their defaults; None must be given. ``fluctuating`` of CV 0 is as the artifact's."""
SPOT_GENERATORS: Mapping[str, Mapping[str, float | None]] = {
    "market": {"instances": None, "duration": 86400.0, "batch_scale": 1.0},
    "constant": {"instances": None, "duration": None},
}


def is_drawn(text: str) -> bool:
    """Whether an argument names a generator whose trace depends on the seed."""
    name = text.partition(":")[0]
    return name in REQUEST_GENERATORS or name == "market"


def segment_of(text: str) -> Segment | None:
    """The segment of the paper that an argument names, if it does."""
    from spotjax.sim.traces.scenarios import SEGMENTS

    return SEGMENTS.get(text)


def seeds_of(arguments: argparse.Namespace) -> range:
    """The seeds that are asked for.

    Raises:
      ConfigError: there are none, one is negative, or more than one where nothing is drawn.
    """
    first, count = arguments.first_seed, arguments.seeds
    if count < 1 or first < 0:
        raise ConfigError(f"--seeds must be at least 1 and --first-seed not negative, got {count} and {first}")
    if count > 1 and not is_drawn(arguments.spot) and not is_drawn(arguments.requests):
        raise ConfigError(f"--seeds {count}: neither --spot nor --requests is drawn, so all runs would be the same")
    return range(first, first + count)


def assumptions_of(arguments: argparse.Namespace) -> Assumptions:
    """Those that are given; others are the defaults, or those of the segment that is named.

    Raises:
      ConfigError: one is out of range.
    """
    given = {field.name: getattr(arguments, field.name) for field in fields(Assumptions)}
    segment = segment_of(arguments.spot)
    if segment is not None and given["start_seconds"] is None:
        given["start_seconds"] = segment.start_seconds
    return Assumptions(**{name: value for name, value in given.items() if value is not None})


def required_rate(arguments: argparse.Namespace) -> RequiredRate | None:
    """What the published systems are told to serve; None for the mean rate.

    Raises:
      ConfigError: it is not positive.
    """
    from spotjax.sim.traces.scenarios import REQUIRED

    if arguments.required_rate is not None:
        if not arguments.required_rate > 0:
            raise ConfigError(f"--required-rate must be more than 0, got {arguments.required_rate:g}")
        return ((0.0, arguments.required_rate),)
    segment = segment_of(arguments.spot)
    steady = {name.lower(): rate for name, rate in REQUIRED.items()}.get(arguments.model)
    if segment is None or steady is None:
        return None
    return segment.required or ((0.0, steady),)


def make_scenario(arguments: argparse.Namespace, assumptions: Assumptions, seed: int) -> Scenario:
    """What is simulated with one seed.

    Raises:
      ConfigError: an argument is wrong.
    """
    from spotjax.commands.plan import latency_source
    from spotjax.meshes.instance import Instance
    from spotjax.meshes.instance_types import instance_type
    from spotjax.models.presets import preset
    from spotjax.sim.world import Scenario

    spec, across = replace(preset(arguments.model), quantization=arguments.quantization), arguments.tensor_instances
    if across < 1:
        raise ConfigError(f"--tensor-instances must be at least 1, got {across}")
    kind = replace(instance_type(arguments.instance_type), tensor_instances=across)
    _, latency = latency_source(arguments.profile, arguments.model, spec, [Instance("any", kind)])
    spot = make_spot(arguments, seed)
    requests = make_requests(arguments, spot.duration, seed)
    name = f"{arguments.model}, {spot.name}, {requests.name}"
    return Scenario(name, spec, latency(kind), kind, spot, requests, assumptions)


def make_requests(arguments: argparse.Namespace, duration: float, seed: int) -> RequestTrace:
    """The requests that the arguments ask for.

    Args:
      arguments: of the command.
      duration: seconds that are covered if they are drawn.
      seed: of the generator.

    Raises:
      ConfigError: an argument is wrong; the message names it, or the line of the file.
    """
    name, _, parameters = arguments.requests.partition(":")
    if name in REQUEST_GENERATORS:
        given = _parameters("--requests", name, parameters, REQUEST_GENERATORS[name])
        trace = _drawn(arguments.requests, name, given, duration, seed)
    else:
        from spotjax.sim.traces.formats import open_requests

        trace = open_requests(_existing("--requests", arguments.requests, REQUEST_GENERATORS))
    if arguments.request_window:
        trace = trace.window(*parsed_window("--request-window", arguments.request_window))
    if arguments.rate is not None:
        trace = trace.scaled_to(arguments.rate)
    if arguments.max_prompt is not None or arguments.max_output is not None:
        most = [2**62 if limit is None else limit for limit in (arguments.max_prompt, arguments.max_output)]
        trace = trace.clipped(*most)
    return trace


def make_spot(arguments: argparse.Namespace, seed: int) -> SpotTrace:
    """The instances that the arguments ask for; ``seed`` is of the generator.

    Raises:
      ConfigError: an argument is wrong; the message names it, or the line of the file.
    """
    name, _, parameters = arguments.spot.partition(":")
    segment = segment_of(arguments.spot)
    if segment is not None:
        trace = segment.spot
    elif name in SPOT_GENERATORS:
        given = _parameters("--spot", name, parameters, SPOT_GENERATORS[name])
        trace = _instances(arguments.spot, name, given, seed)
    else:
        from spotjax.sim.traces.formats import open_spot
        from spotjax.sim.traces.scenarios import SEGMENTS

        trace = open_spot(_existing("--spot", arguments.spot, [*SEGMENTS, *SPOT_GENERATORS]))
    if arguments.spot_window:
        trace = trace.window(*parsed_window("--spot-window", arguments.spot_window))
    if arguments.spot_limit is not None:
        if arguments.spot_limit < 1:
            raise ConfigError(f"--spot-limit must be at least 1, got {arguments.spot_limit}")
        trace = trace.held(arguments.spot_limit)
    if not trace.duration > 0:
        raise ConfigError(f"--spot: {trace.name} covers no time")
    return trace


def _drawn(text: str, name: str, given: Mapping[str, float], duration: float, seed: int) -> RequestTrace:
    import numpy as np

    from spotjax.sim.traces import arrivals
    from spotjax.sim.traces.scenarios import FLUCTUATING_RATES
    from spotjax.sim.workload import RequestTrace

    random = np.random.default_rng(seed)
    match name:
        case "gamma":
            times = arrivals.gamma(given["rate"], given["cv"], duration, random)
        case "poisson":
            times = arrivals.poisson(given["rate"], duration, random)
        case "artifact":
            times = arrivals.artifact(given["rate"], given["cv"], duration, random)
        case _ if given["cv"] == 0:
            times = arrivals.artifact_piecewise(FLUCTUATING_RATES, 60.0, 6.0, random)
        case _:
            times = arrivals.piecewise(FLUCTUATING_RATES, 60.0, given["cv"], random)
    lengths = [arrivals.lognormal(given[of], given[f"{of}_cv"], len(times), random) for of in ("prompt", "output")]
    return RequestTrace.of(text, times, *lengths)


def _instances(text: str, name: str, given: Mapping[str, float], seed: int) -> SpotTrace:
    from spotjax.sim.traces.scenarios import G4DN_MARKET
    from spotjax.sim.workload import by_counts

    instances, duration = given["instances"], given["duration"]
    if instances < 1 or instances % 1:
        raise ConfigError(f"--spot: instances must be a whole number of at least 1, got {instances:g}")
    if name == "constant":
        return by_counts(text, [(0.0, int(instances))], duration)
    return G4DN_MARKET.sample(int(instances), duration, seed, given["batch_scale"], text)


def _parameters(flag: str, name: str, text: str, known: Mapping[str, float | None]) -> dict[str, float]:
    """Reads ``rate=0.35,cv=6``."""
    given: dict[str, float] = {}
    for part in text.split(",") if text else ():
        parameter, _, value = part.partition("=")
        if parameter not in known:
            raise ConfigError(f"{flag}: {name} has no parameter {parameter!r}; it has {', '.join(known)}")
        try:
            given[parameter] = float(value)
        except ValueError as problem:
            raise ConfigError(f"{flag}: {parameter} of {name} must be a number, got {value!r}") from problem
        if not isfinite(given[parameter]):
            raise ConfigError(f"{flag}: {parameter} of {name} must be finite, got {value}")
    for parameter, default in known.items():
        if parameter not in given:
            if default is None:
                raise ConfigError(f"{flag}: {name} needs {parameter}, such as {name}:{parameter}=1")
            given[parameter] = default
    return given


def parsed_window(flag: str, text: str) -> tuple[float, float]:
    """Reads ``START:STOP``; raises ConfigError, which names the flag."""
    start, colon, stop = text.partition(":")
    try:
        seconds = float(start or 0), float(stop or inf)
    except ValueError:
        colon = ""
    if not colon or not stop:
        raise ConfigError(f"{flag} is START:STOP in seconds, such as 0:600, got {text!r}")
    return seconds


def _existing(flag: str, text: str, names: Iterable[str]) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {text!r}, and it is none of {', '.join(names)}")
    return path
