"""Systems under test by name, set up for a scenario. What they do is in their own files, loaded when one is asked for.

A name may end in ``:N``: that system on N on-demand instances that nobody takes away, instead of the spot trace.
``on-demand:N`` is short for ``spotjax:N``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from spotjax.errors import ConfigError
from spotjax.models.presets import PRESETS
from spotjax.sim.systems.spotjax_options import FEATURES, Feature, SpotjaxOptions
from spotjax.sim.world import Scenario, System

if TYPE_CHECKING:
    from spotjax.sim.systems.artifact import Workload

RequiredRate = tuple[tuple[float, float], ...]
"""(From second, requests per second) that the solver of the published systems has to reach."""
Build = Callable[[Scenario, RequiredRate | None], System]

LEAST_DEVICES = {"opt-6.7b": 4, "gpt-20b": 12, "llama-30b": 16}
"""What the artifact's scripts say that one replica takes at least (SpotServe, table 1)."""
BASELINE_BATCHES_AHEAD = 2
"""Batches that a replica of a baseline is given at once, in all of the artifact's scripts but one ("old batching")."""


def _spotjax(
    scenario: Scenario,
    required: RequiredRate | None,
    without: Feature | None = None,
    options: SpotjaxOptions | None = None,
) -> System:
    from spotjax.sim.systems.spotjax import Spotjax

    return Spotjax(without, options)


def _spotserve(scenario: Scenario, required: RequiredRate | None, batches_ahead: int = 1) -> System:
    from spotjax.sim.systems.spotserve import SpotServe

    return SpotServe(published_workload(scenario, required), batches_ahead)


def _reparallelization(scenario: Scenario, required: RequiredRate | None) -> System:
    from spotjax.sim.systems.baselines import Reparallelization

    return Reparallelization(published_workload(scenario, required), BASELINE_BATCHES_AHEAD)


def _rerouting(scenario: Scenario, required: RequiredRate | None) -> System:
    from spotjax.sim.systems.baselines import Rerouting

    pool = max(count for _, count in scenario.spot.counts())
    return Rerouting(published_workload(scenario, required), BASELINE_BATCHES_AHEAD, pool)


def _skyserve(scenario: Scenario, required: RequiredRate | None) -> System:
    from spotjax.sim.systems.skyserve import SkyServe

    return SkyServe()


PUBLISHED: Mapping[str, Build] = {
    "spotserve": _spotserve,
    "spotserve-as-baselines": partial(_spotserve, batches_ahead=BASELINE_BATCHES_AHEAD),
    "spotserve-new-batching": partial(_spotserve, batches_ahead=0),
    "reparallelization": _reparallelization,
    "rerouting": _rerouting,
}
"""Those of the artifact, by name.

SpotServe gives a busy replica up to one batch more in its public script; as its baselines do, up to two; in what the
script calls new batching, none."""
SYSTEMS: Mapping[str, Build] = {
    "spotjax": _spotjax,
    "spotjax-late": partial(_spotjax, options=SpotjaxOptions(leave="late")),
    "spotjax-fallback": partial(_spotjax, options=SpotjaxOptions(fallback=True)),
    **{f"spotjax-no-{feature}": partial(_spotjax, without=feature) for feature in FEATURES},
    "skyserve": _skyserve,
    **PUBLISHED,
}
"""By name. ``spotjax-late`` leaves instances when it must; ``spotjax-fallback`` rents on demand what is missing."""


def system(name: str, scenario: Scenario, required: RequiredRate | None = None) -> tuple[System, Scenario]:
    """A system, and the scenario as it is for it.

    Args:
      name: see the module.
      scenario: what is simulated.
      required: for the published systems; None takes the mean rate of the requests.

    Raises:
      ConfigError: there is no such system, or a published one has no tables of the model or the instances.
    """
    base, _, count = name.partition(":")
    if base == "on-demand":
        base = "spotjax" if count else base
    if base not in SYSTEMS:
        raise ConfigError(f"no system is known as {name!r}; known are {', '.join(SYSTEMS)} and on-demand:N")
    if ":" in name:
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"system {name!r}: a number of on-demand instances follows the colon, such as {base}:4")
        from spotjax.sim.traces.scenarios import on_demand

        scenario = replace(scenario, spot=on_demand(int(count), scenario.spot.duration))
    if base in PUBLISHED:
        scenario = _with_wide_tensors(scenario)
    return SYSTEMS[base](scenario, required), scenario


def _with_wide_tensors(scenario: Scenario) -> Scenario:
    """With tensor groups over as many instances as the artifact's solver takes; its tables were measured so."""
    from spotjax.planner.published_tables import TABLES

    widest = max(table.max_tensor for table in TABLES.values())
    return replace(scenario, kind=replace(scenario.kind, tensor_instances=max(1, widest // scenario.kind.devices)))


def published_workload(scenario: Scenario, required: RequiredRate | None) -> Workload:
    """What the artifact's scripts would be told of a scenario.

    Raises:
      ConfigError: no tables are published of the model on these instances.
    """
    from spotjax.planner.published_tables import TABLES
    from spotjax.sim.systems.artifact import Workload

    name = next((name for name in TABLES if PRESETS[name] == scenario.spec), None)
    if name is None or scenario.kind.name != "g4dn.12xlarge":
        raise ConfigError(f"the published systems have tables of {', '.join(TABLES)} on g4dn.12xlarge only")
    mean = ((0.0, scenario.requests.rate(scenario.spot.duration)),)
    return Workload(TABLES[name], required or mean, LEAST_DEVICES[name])
