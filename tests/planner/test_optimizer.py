from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import fleet, kind, llama, specs

from spotjax.errors import NoFeasibleShape
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.planner.cost import memory_need, throughput
from spotjax.planner.demand import Demand
from spotjax.planner.optimizer import choose_shape, places_offered

DEMAND = Demand(batch=4, prompt=8, output=8, page_size=4)


@st.composite
def fleets(draw: st.DrawFn) -> list[Instance]:
    devices = draw(st.lists(st.sampled_from((1, 2, 3, 4)), min_size=1, max_size=5))
    memories = draw(st.lists(st.sampled_from((12_000, 25_000, 10**6)), min_size=5, max_size=5))
    speeds = draw(st.lists(st.sampled_from((1e9, 2e9)), min_size=5, max_size=5))
    return [
        Instance(f"i{n}", kind(count, memories[n], speeds[n], name=f"{count}-{memories[n]}-{speeds[n]}"))
        for n, count in enumerate(devices)
    ]


def brute_force(spec, instances) -> float:
    """Most throughput over every shape and every set of instances."""
    best = 0.0
    heads, layers = spec.config.heads, spec.config.layers
    for chosen in range(1, 2 ** len(instances)):
        hosts = [instance for n, instance in enumerate(instances) if chosen >> n & 1]
        for tensor in (m for m in range(1, 5) if heads % m == 0 and all(m <= i.type.devices for i in hosts)):
            for stages in range(1, layers + 1):
                for data in range(1, places_offered(hosts, tensor) // stages + 1):
                    shape, ranges = MeshShape(data, stages, tensor), split_layers(layers, stages)
                    need = memory_need(spec, shape, ranges, DEMAND).total
                    if all(host.type.memory_bytes >= need for host in hosts):
                        slowest = min(throughput(spec, shape, ranges, h.type, 4, DEMAND.context) for h in hosts)
                        best = max(best, slowest)
    return best


@given(specs(), fleets())
def test_the_choice_has_the_most_throughput_of_all_shapes_on_all_sets_of_instances(spec, instances) -> None:
    best = brute_force(spec, instances)
    if best == 0:
        with pytest.raises(NoFeasibleShape):
            choose_shape(spec, instances, DEMAND)
        return
    assert choose_shape(spec, instances, DEMAND).throughput == pytest.approx(best)


@given(specs(), fleets())
def test_every_candidate_fits_the_memory_and_the_places_of_its_hosts(spec, instances) -> None:
    try:
        decision = choose_shape(spec, instances, DEMAND)
    except NoFeasibleShape as error:
        assert "add" in str(error) or "more memory" in str(error)
        return
    for candidate in (decision, *decision.runner_ups):
        shape = candidate.shape
        need = memory_need(spec, shape, candidate.layers, DEMAND)
        assert all(need.total <= host.type.memory_bytes for host in candidate.hosts)
        assert all(shape.tensor <= host.type.devices for host in candidate.hosts)
        assert places_offered(candidate.hosts, shape.tensor) >= shape.data * shape.stage
        assert spec.config.heads % shape.tensor == 0
        assert candidate.layers == split_layers(spec.config.layers, shape.stage)
        assert candidate.reason
    rates = [candidate.throughput for candidate in (decision, *decision.runner_ups)]
    assert rates == sorted(rates, reverse=True)
    assert decision.shape not in [candidate.shape for candidate in decision.runner_ups]


def needing(spec, shape: MeshShape) -> int:
    return memory_need(spec, shape, split_layers(spec.config.layers, shape.stage), DEMAND).total


def test_three_devices_hold_six_heads_in_three_shards() -> None:
    spec = llama(heads=6, kv_heads=2, layers=1)
    memory = needing(spec, MeshShape(1, 1, 3))
    assert choose_shape(spec, fleet(4, memory=memory), DEMAND).shape == MeshShape(1, 1, 3)


def test_five_layers_are_split_unevenly_over_three_instances() -> None:
    spec = llama(layers=5, vocab=2)
    decision = choose_shape(spec, fleet(1, 1, 1, memory=needing(spec, MeshShape(1, 3, 1))), DEMAND)
    assert decision.shape == MeshShape(1, 3, 1)
    assert decision.layers == ((0, 2), (2, 4), (4, 5))


def test_tensor_degree_never_exceeds_an_instance() -> None:
    spec = llama(heads=4, kv_heads=4, layers=1, mlp=64)
    memory = needing(spec, MeshShape(1, 1, 4))
    assert needing(spec, MeshShape(1, 1, 2)) > memory
    with pytest.raises(NoFeasibleShape):
        choose_shape(spec, fleet(2, 2, memory=memory), DEMAND)
    assert choose_shape(spec, fleet(2, 4, memory=memory), DEMAND).shape == MeshShape(1, 1, 4)


def test_only_ready_instances_carry_a_mesh() -> None:
    instances = [replace(i, state=state) for i, state in zip(fleet(1, 1, 1, 1, 1), InstanceState, strict=True)]
    decision = choose_shape(llama(), instances, DEMAND)
    assert [host.name for host in decision.hosts] == [i.name for i in instances if i.state is InstanceState.READY]
    with pytest.raises(NoFeasibleShape, match="no instance is ready"):
        choose_shape(llama(), [i for i in instances if i.state is not InstanceState.READY], DEMAND)


def test_a_slow_instance_is_left_out_when_it_would_hold_up_the_others() -> None:
    fast, slow = kind(1, flops=1e10, name="fast"), kind(1, flops=1e5, name="slow")
    instances = [Instance("a", fast), Instance("b", slow), Instance("c", fast)]
    decision = choose_shape(llama(), instances, DEMAND)
    assert decision.shape.data == 2 and [host.name for host in decision.hosts] == ["a", "c"]


def test_a_wanted_shape_is_taken_while_it_fits_then_loses_replicas_then_is_given_up() -> None:
    spec = llama(layers=4)
    wanted = MeshShape(2, 2, 1)
    assert choose_shape(spec, fleet(1, 1, 1, 1, 1), DEMAND, wanted).shape == wanted
    fewer = choose_shape(spec, fleet(1, 1, 1), DEMAND, wanted)
    assert fewer.shape == MeshShape(1, 2, 1) and "wanted 2x2x1 does not fit" in fewer.reason
    free = choose_shape(spec, fleet(1), DEMAND, wanted)
    assert free.shape == MeshShape(1, 1, 1) and "wanted 2x2x1 does not fit" in free.reason


@pytest.mark.parametrize("wanted", [MeshShape(1, 1, 4), MeshShape(1, 6, 1)])
def test_a_wanted_shape_that_the_model_cannot_have_is_refused(wanted: MeshShape) -> None:
    with pytest.raises(ValueError, match=f"wanted mesh {wanted}"):
        choose_shape(llama(heads=6, layers=5), fleet(4, 4), DEMAND, wanted)


def test_the_refusal_says_how_many_more_devices_would_do() -> None:
    spec = llama(layers=4, vocab=2)
    memory = needing(spec, MeshShape(1, 4, 1))
    with pytest.raises(
        NoFeasibleShape, match=r"at least 4 devices like those of box1 \(1x4x1, .*add 1 more place of 1"
    ):
        choose_shape(spec, fleet(1, 1, 1, memory=memory), DEMAND)


def test_the_refusal_says_how_much_memory_would_do() -> None:
    with pytest.raises(NoFeasibleShape, match=r"even split as 1x5x2 the model needs .* on a device .* more memory"):
        choose_shape(llama(), fleet(2, 2, memory=100), DEMAND)
