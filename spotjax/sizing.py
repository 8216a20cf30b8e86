"""What settings come to for a given model: limits, shapes of steps, planning, memory. No jax, no devices.

Shared by embedded mode and by the controller of a fleet.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from spotjax.config import ServeConfig
from spotjax.engine.scheduler import Limits
from spotjax.errors import ConfigError, NoFeasibleShape
from spotjax.fleet.admission import ServiceLimits
from spotjax.fleet.change import Planning
from spotjax.fleet.membership import Membership
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import tensor_degrees
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand
from spotjax.planner.optimizer import choose_shape
from spotjax.runtime.buckets import Buckets

LONGEST_DEFAULT = 4096
"""Positions that a server offers unless told otherwise, however many the model could take."""
TYPICAL_POSITIONS = 512
"""Positions of a typical sequence, for which each of ``max_batch`` sequences finds KV pages by default."""
VIRTUAL_SPREAD = 3
"""By default about so many virtual devices hold the model, so that a mesh is needed; fewer where there are not six."""


def resolve_limits(config: ServeConfig, spec: ModelSpec) -> tuple[ServiceLimits, Buckets]:
    """What the service accepts, and the shapes its steps run at.

    Raises:
      ConfigError: ``max_model_len`` is more than the model was made for.
    """
    own = spec.config.max_positions
    if config.max_model_len > own:
        raise ConfigError(f"max_model_len must be at most {own}, the model's own limit, got {config.max_model_len}")
    positions = config.max_model_len or min(own, LONGEST_DEFAULT)
    typical = config.max_batch * min(positions, TYPICAL_POSITIONS)
    pages = (config.kv_pages or -(-max(positions, typical) // config.page_size)) + 1
    buckets = Buckets(config.max_batch, config.prefill_tokens, config.page_size, positions)
    limits = ServiceLimits(
        max_positions=positions,
        pages=pages,
        page_size=config.page_size,
        queue=config.queue_limit,
        retain_seconds=config.retain_seconds,
        replica=lambda depth: Limits(config.max_batch, config.prefill_tokens, depth, buckets.prefill_fits),
        prefix_cache=config.prefix_cache,
    )
    return limits, buckets


def resolve_dtype(setting: str, platform: str) -> np.dtype:
    """The dtype of parameters and KV: float32 on CPU, where bfloat16 is 5-10 times slower, else bfloat16."""
    if setting == "auto":
        setting = "float32" if platform == "cpu" else "bfloat16"
    return np.dtype(ml_dtypes.bfloat16 if setting == "bfloat16" else setting)


def planning_for(config: ServeConfig, spec: ModelSpec, limits: ServiceLimits) -> Planning:
    """What every change of the mesh is planned with.

    Raises:
      ConfigError: the model cannot be divided as ``mesh`` says.
    """
    typical = min(TYPICAL_POSITIONS // 2, limits.max_positions // 2)
    demand = Demand(
        batch=config.max_batch,
        prompt=typical,
        output=typical,
        page_size=config.page_size,
        kv_pages=limits.pages - 1,
        step_tokens=config.prefill_tokens,
    )
    return Planning(spec, demand, pinned_mesh(config.mesh, spec), recovery=config.recovery)


def pinned_mesh(setting: str, spec: ModelSpec) -> MeshShape | None:
    """The mesh that ``mesh`` names, None for ``auto``.

    Raises:
      ConfigError: the model cannot be divided like that.
    """
    if setting == "auto":
        return None
    mesh, c = MeshShape.parse(setting), spec.config
    if c.heads % mesh.tensor:
        raise ConfigError(f"mesh {mesh}: the tensor degree must divide the model's {c.heads} query heads")
    if mesh.stage > c.layers:
        raise ConfigError(f"mesh {mesh}: the model's {c.layers} layers cannot fill {mesh.stage} stages")
    return mesh


def virtual_memory(spec: ModelSpec, limits: ServiceLimits, devices: int) -> int:
    """Bytes of one virtual device, such that the model needs several of ``devices``."""
    need = spec.parameter_bytes + limits.pages * limits.page_size * spec.kv_bytes_per_position
    return need * 5 // 4 // max(1, min(VIRTUAL_SPREAD, devices // 2))


def foreseeable_degrees(planning: Planning, instances: tuple[Instance, ...]) -> list[int]:
    """Tensor degrees of the meshes that would be chosen with all instances, one fewer, two fewer ..."""
    degrees: dict[int, None] = {}
    for left in range(len(instances), 0, -1):
        ready = [replace(instance, state=InstanceState.READY) for instance in instances[:left]]
        try:
            degrees[choose_shape(planning.spec, ready, planning.demand, planning.wanted).shape.tensor] = None
        except NoFeasibleShape:
            break
    allowed = tensor_degrees(planning.spec, instances[0].type.devices)
    return [degree for degree in degrees if degree in allowed]


def check_first_mesh(planning: Planning, members: Membership, placement: Placement | None) -> None:
    """A mesh that does not fit at start is a mistake in the settings; later on, requests wait for instances."""
    if placement is None:
        choose_shape(planning.spec, members.all(), planning.demand, planning.wanted)  # raises, saying what would fit
    elif planning.wanted is not None and placement.shape != planning.wanted:
        raise ConfigError(f"mesh {planning.wanted} does not fit these instances; {placement.shape} would")
