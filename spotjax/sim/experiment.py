"""One run from end to end: a scenario, a system by its name, and what came of it."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable

from spotjax.meshes.layout import split_layers
from spotjax.sim.results import Outcome, estimate_prefill_share
from spotjax.sim.systems.registry import RequiredRate, system
from spotjax.sim.world import Scenario, World

TICKS = 100
"""How often the progress of a run is told."""


def simulate(
    scenario: Scenario,
    name: str,
    seed: int = 0,
    required: RequiredRate | None = None,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Runs a system until the end of the spot trace.

    Args:
      scenario: what is simulated.
      name: of the system, see ``systems.registry``.
      seed: of the generators that made the scenario; noted in the outcome.
      required: see ``systems.registry.system``.
      progress: told the share of simulated time that has passed, from time to time.

    Raises:
      ConfigError: there is no such system, or it is not for this scenario.
    """
    tested, scenario = system(name, scenario, required)
    world = World(scenario)
    if progress is not None:
        for tick in range(1, TICKS + 1):
            world.at(scenario.spot.duration * tick / TICKS, progress, tick / TICKS)
    gc.freeze()  # the book is millions of numbers, which the collector would look through again and again
    try:
        world.run(tested)
    finally:
        gc.unfreeze()
    return Outcome.of(world, name, seed)


def prefill_share(outcome: Outcome, scenario: Scenario, batch: int = 8) -> float | None:
    """Share of a replica's time that prompts take, estimated on the mesh that served longest; None if none did.

    For requests of mean length, with ``batch`` of them decoding at once.
    """
    ends = [*(change.seconds for change in outcome.changes[1:]), outcome.duration]
    served: defaultdict[tuple[int, int], float] = defaultdict(float)
    for change, end in zip(outcome.changes, ends, strict=False):
        if change.shape is not None:
            served[change.shape.stage, change.shape.tensor] += end - change.seconds
    if not served or not len(outcome):
        return None
    stage, tensor = max(served, key=lambda key: served[key])
    layers = split_layers(scenario.spec.config.layers, stage)
    prompt, output = (round(float(column.mean())) for column in (outcome.prompt, outcome.output))
    return estimate_prefill_share(scenario.latency, tensor, layers, batch, prompt, output)
