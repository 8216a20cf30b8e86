"""The ``[capacity]`` table of the file that the setting ``capacity`` names: how many machines, for what, at what price.

The ``[provider]`` table of the same file says who rents them out; it is read by ``spotjax.fleet.providers.registry``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from spotjax.errors import ConfigError

OnDemand = Literal["never", "fallback", "always"]


class CapacitySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a controller buys its own capacity. ``read`` checks what fields say of each other."""

    fleet: Annotated[
        str,
        Meta(
            pattern=r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$",
            description="name that this fleet's machines are marked with and called by; two fleets of one account need "
            "different ones",
        ),
    ] = "spotjax"
    most: Annotated[int, Meta(ge=1, le=1024, description="instances that are wanted at most")]
    least: Annotated[int, Meta(ge=1, le=1024, description="instances that are wanted at least, unless idle")] = 1
    idle: Annotated[
        int, Meta(ge=0, le=1024, description="instances that are wanted while nobody asks for anything")
    ] = 1
    idle_seconds: Annotated[
        float, Meta(ge=0, description="seconds without a request after which the service is idle")
    ] = 900.0
    spares: Annotated[
        int, Meta(ge=0, le=1024, description="instances kept beyond those that the load needs, for the next preemption")
    ] = 0
    on_demand: Annotated[
        OnDemand,
        Meta(
            description="on-demand machines: never; as a fallback, for spot ones that are wanted but not there; or "
            "always, instead of spot ones"
        ),
    ] = "fallback"
    least_on_demand: Annotated[
        int, Meta(ge=0, le=1024, description="of the wanted instances, those that are on demand at all times")
    ] = 0
    fallback_seconds: Annotated[
        float,
        Meta(
            ge=0,
            description="seconds that spot machines may be missing before on-demand ones are asked for; 0: both "
            "are, together",
        ),
    ] = 0.0
    cost_per_hour: Annotated[
        float, Meta(ge=0, description="USD per hour that all machines together may cost; 0: only the day is capped")
    ] = 0.0
    cost_per_day: Annotated[
        float, Meta(ge=0, description="USD that may be spent in a day, midnight to midnight UTC; 0: only the hour is")
    ] = 0.0
    stop_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds from the decision to give a machine back until it surely costs nothing any more; the "
            "cap on a day keeps back what all machines cost meanwhile",
        ),
    ] = 300.0
    utilisation: Annotated[
        float, Meta(gt=0, le=1, description="share of what the instances can serve that they are planned to be given")
    ] = 0.5
    latency_seconds: Annotated[
        float, Meta(ge=0, description="target for the seconds of a request, its wait included; 0: none, only keep up")
    ] = 0.0
    percentile: Annotated[float, Meta(gt=0, lt=1, description="share of requests that latency_seconds is for")] = 0.99
    window_seconds: Annotated[float, Meta(gt=0, description="seconds over which the load is measured")] = 60.0
    shrink_seconds: Annotated[
        float,
        Meta(ge=0, description="seconds for which fewer instances must have been enough before one is given back"),
    ] = 300.0
    action_seconds: Annotated[
        float, Meta(ge=0, description="seconds between two requests for machines, or two that are given back, at least")
    ] = 1.0
    join_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds after which a machine that was asked for and runs, but never joined, is given back",
        ),
    ] = 900.0
    ready_seconds: Annotated[
        float,
        Meta(
            gt=0, description="seconds after which a machine whose worker registered, but is not ready, is given back"
        ),
    ] = 3600.0
    return_seconds: Annotated[
        float,
        Meta(gt=0, description="seconds that a machine whose worker has left or is lost is kept for it to return"),
    ] = 60.0
    retry_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds that an offer is left alone after it was refused; doubles each time, with jitter",
        ),
    ] = 30.0
    most_retry_seconds: Annotated[float, Meta(gt=0, description="at most so long")] = 1800.0
    add_seconds: Annotated[
        float, Meta(gt=0, description="seconds for which instances that an operator added are wanted")
    ] = 3600.0


def read(path: Path) -> tuple[dict[str, Any], CapacitySettings]:
    """The file's ``[provider]`` table, unread, and its ``[capacity]``.

    Raises:
      ConfigError: it cannot be read, a table or key is unknown or missing, a value is out of range, or two contradict.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as TOML: {error}") from error
    if set(tables) != {"provider", "capacity"}:
        raise ConfigError(f"{path} must have the tables [provider] and [capacity], got {', '.join(tables) or 'none'}")
    try:
        settings = msgspec.convert(tables["capacity"], CapacitySettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[capacity] in {path}: {error}") from error
    refuse_contradictions(settings, str(path))
    return tables["provider"], settings


def refuse_contradictions(settings: CapacitySettings, where: str) -> None:
    """Raises ConfigError for numbers that cannot hold together."""

    def refuse(problem: str) -> None:
        raise ConfigError(f"[capacity] in {where}: {problem}")

    for low, high in (("least", "most"), ("idle", "least"), ("least_on_demand", "most"), ("spares", "most")):
        if getattr(settings, low) > getattr(settings, high):
            refuse(f"{low} ({getattr(settings, low)}) must be at most {high} ({getattr(settings, high)})")
    if settings.on_demand == "never" and settings.least_on_demand:
        refuse(f"least_on_demand ({settings.least_on_demand}) has no meaning with on_demand = 'never'")
    if not settings.cost_per_hour and not settings.cost_per_day:
        refuse("a cap on spending is needed: give cost_per_hour, cost_per_day or both, in USD")
    if settings.retry_seconds > settings.most_retry_seconds:
        refuse(
            f"retry_seconds ({settings.retry_seconds:g}) must be at most most_retry_seconds "
            f"({settings.most_retry_seconds:g})"
        )
