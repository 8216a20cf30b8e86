"""What ``spotjax plan --json`` prints; ``--from`` reads its placement."""

from __future__ import annotations

from math import inf
from typing import Any

from spotjax.commands.plan import Study
from spotjax.planner.capacity import Capacity
from spotjax.planner.optimizer import Candidate
from spotjax.planner.plan import Phase

FIELDS = ("batch", "throughput", "rate", "latency", "seconds", "percentile_seconds", "cost_per_hour", "instances")
"""Of a configuration; what is infinite is null."""


def as_plain(study: Study) -> dict[str, Any]:
    """Everything in terms of dict, list, str and numbers, but for the placement, which ``api.plain`` knows."""
    plan = study.plan
    return {
        "model": study.model,
        "latencies": study.latencies,
        "chosen": _configuration(study.decision),
        "runner_ups": [_configuration(loser) for loser in study.decision.runner_ups],
        "capacity": None if study.capacity is None else _capacity(study.capacity),
        "placement": study.placement,
        "migration": {
            "bytes_in_place": plan.bytes_in_place,
            "bytes_moved": plan.bytes_moved,
            "bytes_loaded": plan.bytes_loaded,
            "seconds": {str(phase): plan.seconds(phase) for phase in Phase},
            "lower_bound_seconds": {str(phase): plan.lower_bound_seconds[phase] for phase in Phase},
            "sequences_kept": study.kept,
            "sequences_recomputed": study.recomputed,
            "lost_cohorts": plan.lost,
        },
    }


def _configuration(candidate: Candidate) -> dict[str, Any]:
    values = {name: getattr(candidate, name) for name in (*FIELDS, "reason")}
    finite = {name: None if value == inf else value for name, value in values.items()}
    return {"shape": str(candidate.shape), **finite, "bytes_per_device": candidate.memory.total}


def _capacity(capacity: Capacity) -> dict[str, Any]:
    return {
        "target": _configuration(capacity.target),
        "request_spot": capacity.request_spot,
        "request_on_demand": capacity.request_on_demand,
        "release": capacity.release,
        "spares": capacity.spares,
    }
