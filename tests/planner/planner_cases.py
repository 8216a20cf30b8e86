"""Small random models, fleets and changes of the mesh, for property tests of the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import assume
from hypothesis import strategies as st

from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.meshes.layout import split_layers, tensor_degrees
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.spec import ModelSpec
from spotjax.planner.cohorts import assign_cohorts
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.planner.matcher import match
from spotjax.planner.needs import needs_of
from spotjax.planner.optimizer import places_offered

PAGE_SIZE = 2


def kind(devices: int, memory: int = 2**40, flops: float = 1e12, name: str = "") -> InstanceType:
    return InstanceType(
        name=name or f"box{devices}",
        devices=devices,
        memory_bytes=memory,
        flops=flops,
        memory_bandwidth=flops / 10,
        link_bandwidth=1e10,
        network_bandwidth=1e9,
    )


def fleet(*devices: int, memory: int = 2**40) -> list[Instance]:
    return [Instance(f"i{n}", kind(count, memory)) for n, count in enumerate(devices)]


def llama(heads: int = 6, kv_heads: int = 2, layers: int = 5, **changes: int) -> ModelSpec:
    shapes = {"vocab": 11, "width": 4, "head_size": 2, "mlp": 7} | changes
    return ModelSpec(DecoderConfig(layers=layers, heads=heads, kv_heads=kv_heads, **shapes))


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 3))
    experts = draw(st.none() | st.integers(1, 7).map(lambda count: Experts(count, 1, shared_mlp=count // 2)))
    config = DecoderConfig(
        vocab=draw(st.integers(2, 9)),
        width=draw(st.integers(1, 4)),
        layers=draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_size=2,
        mlp=draw(st.integers(1, 9)),
        tied_embeddings=draw(st.booleans()),
        positions=draw(st.sampled_from(("rotary", "learned"))),
        norm=draw(st.sampled_from(("rms", "layer"))),
        norm_place=draw(st.sampled_from(("before", "after"))),
        gated_mlp=experts is not None or draw(st.booleans()),
        experts=experts,
        embedding_width=draw(st.sampled_from((None, 3))),
        max_positions=draw(st.integers(1, 9)),
    )
    return ModelSpec(config, draw(st.sampled_from((2, 4))), draw(st.sampled_from(("none", "int8"))))


@st.composite
def shapes(draw: st.DrawFn, spec: ModelSpec, instances: Sequence[Instance], most: int = 3) -> MeshShape:
    """A shape of the model that fits the instances."""
    limit = max(instance.type.devices for instance in instances)
    tensor = draw(st.sampled_from(tensor_degrees(spec, limit)))
    places = places_offered(instances, tensor)
    stage = draw(st.integers(1, min(spec.config.layers, places, most)))
    return MeshShape(draw(st.integers(1, min(most, places // stage))), stage, tensor)


@dataclass(frozen=True)
class Change:
    """A mesh that serves, what became of its instances, and the mesh that is to follow."""

    spec: ModelSpec
    instances: tuple[Instance, ...]
    before: Placement
    shape: MeshShape
    cohorts: tuple[KvCohort, ...]
    holdings: Holdings

    @property
    def hosts(self) -> tuple[Instance, ...]:
        return tuple(i for i in self.instances if i.state is InstanceState.READY)

    @property
    def after_layers(self) -> tuple[tuple[int, int], ...]:
        return split_layers(self.spec.config.layers, self.shape.stage)


def placed(spec: ModelSpec, shape: MeshShape, instances: Sequence[Instance]) -> Placement:
    layers = split_layers(spec.config.layers, shape.stage)
    nothing = Holdings({}, spec.dtype_bytes)
    return Placement(0, shape, layers, match(shape, needs_of(spec, shape, layers, ()), instances, nothing))


@st.composite
def changes(
    draw: st.DrawFn, sizes: Sequence[int] = (1, 2, 4), most_instances: int = 5, most: int = 3, with_gone: bool = True
) -> Change:
    spec = draw(specs())
    devices = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=most_instances))
    old = draw(st.integers(1, len(devices)))
    instances = fleet(*devices)
    before_shape = draw(shapes(spec, instances[:old], most))
    ordered = draw(st.permutations(instances[:old]))
    before = placed(spec, before_shape, ordered)
    # Any device may hold anything, whatever the matcher would have made of it.
    shuffled = {
        device: to
        for instance in instances
        for device, to in zip(instance.devices, draw(st.permutations(instance.devices)), strict=True)
    }
    before = replace(before, devices={position: shuffled[device] for position, device in before.devices.items()})
    states = [InstanceState.READY, InstanceState.NOTICED, *([InstanceState.GONE] if with_gone else [])]
    after = tuple(
        replace(instance, state=draw(st.sampled_from(states)) if n < old else InstanceState.READY)
        for n, instance in enumerate(instances)
    )
    ready = [instance for instance in after if instance.state is InstanceState.READY]
    assume(ready)
    shape = draw(shapes(spec, ready, most))
    live = {
        d: [LiveSequence(key, pages, pages * PAGE_SIZE) for key, pages in enumerate(draw(page_counts))]
        for d in range(before_shape.data)
    }
    cohorts = assign_cohorts(live, shape.data, draw(st.integers(2, 8)), PAGE_SIZE).cohorts
    return Change(spec, after, before, shape, cohorts, Holdings.of(spec, before, cohorts, after))


page_counts = st.lists(st.integers(1, 3), max_size=3)
