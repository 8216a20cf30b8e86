"""Parameters on their way between placements: exact contents, no needless copies, and the bytes that the plan says."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import SHARED_HEADS, RandomCheckpoint, shard

from spotjax.errors import CheckpointError, SliceUnavailable
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState, InstanceType
from spotjax.meshes.layout import shard_index, slices_at, split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Index, intersect
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Links
from spotjax.planner.matcher import match
from spotjax.planner.migration import MigrationPlan, Phase, plan_migration
from spotjax.planner.needs import StackedNeeds, needs_of
from spotjax.reshard import parameters
from spotjax.reshard.parameters import ParameterMover
from spotjax.reshard.shards import ShardStore, host_buffer
from spotjax.reshard.transfer import Traffic

WEIGHTS = RandomCheckpoint(SHARED_HEADS)
SPEC = WEIGHTS.spec
ARRAYS = {array.name: array for array in SPEC.parameters}


def fleet(count: int, devices: int, gone: Sequence[str] = ()) -> list[Instance]:
    kind = InstanceType("box", devices, 1 << 40, 1e10, 1e10, 1e10, 1e9)
    names = [f"i{number}" for number in range(count)]
    return [Instance(name, kind, InstanceState.GONE if name in gone else InstanceState.READY) for name in names]


def device_of(devices: int) -> dict[DeviceRef, jax.Device]:
    """jax devices of the instances of that many devices."""
    return {DeviceRef(f"i{number // devices}", number % devices): device for number, device in enumerate(jax.devices())}


def placements(instances: int, devices: int) -> st.SearchStrategy[Placement]:
    """Any shape that fits on any groups, tensor shards inside one instance in any order."""

    @st.composite
    def draw_placement(draw: st.DrawFn) -> Placement:
        tensor = draw(st.sampled_from([m for m in (1, 2, 3, 4) if m <= devices]))
        groups = [
            [DeviceRef(f"i{number}", start + m) for m in range(tensor)]
            for number in range(instances)
            for start in range(0, devices - tensor + 1, tensor)
        ]
        groups = [draw(st.permutations(group)) for group in draw(st.permutations(groups))]
        stages = draw(st.integers(1, min(SHARED_HEADS.layers, len(groups))))
        shape = MeshShape(draw(st.integers(1, len(groups) // stages)), stages, tensor)
        places = {
            Position(d, p, m): groups[d * stages + p][m]
            for d in range(shape.data)
            for p in range(stages)
            for m in range(tensor)
        }
        return Placement(1, shape, split_layers(SHARED_HEADS.layers, stages), places)

    return draw_placement()


def plan_for(
    placement: Placement, before: Placement | None, instances: Sequence[Instance]
) -> tuple[dict[DeviceRef, StackedNeeds], MigrationPlan]:
    needs = needs_of(SPEC, placement.shape, placement.layers, [])
    by_device = {placement.devices[position]: arrays.of_parameters() for position, arrays in needs.items()}
    return by_device, plan_migration(by_device, Holdings.of(SPEC, before, [], instances), Links.of(instances))


def mover(devices: int) -> ParameterMover:
    return ParameterMover(SPEC, np.dtype(np.float32), WEIGHTS, device_of(devices).__getitem__)


def pointers(store: ShardStore) -> dict[tuple[DeviceRef, str], int]:
    return {
        (device, name): held.buffer.unsafe_buffer_pointer()
        for device in store.devices()
        for name, held in store.at(device).items()
    }


def check_contents(store: ShardStore, placement: Placement, devices: Mapping[DeviceRef, jax.Device]) -> None:
    """Every device holds exactly the shards of its position, padding of zeros included, and nothing else."""
    tensor = placement.shape.tensor
    assert set(store.devices()) == set(placement.devices.values())
    for position, device in placement.devices.items():
        wanted = slices_at(SPEC.parameters, SPEC, placement.shape, placement.layers, position)
        assert set(store.at(device)) == set(wanted)
        for name, index in wanted.items():
            held = store.at(device)[name]
            assert held.index == index and held.buffer.devices() == {devices[device]}
            np.testing.assert_array_equal(held.buffer, shard(WEIGHTS, ARRAYS[name], tensor, position.tensor))


@settings(max_examples=40, deadline=None)
@given(sequence=st.lists(placements(2, 4), min_size=2, max_size=4))
def test_any_sequence_of_placements_keeps_contents_and_moves_what_the_plan_says(sequence: list[Placement]) -> None:
    instances, devices, store, before = fleet(2, 4), device_of(4), ShardStore({}), None
    for placement in sequence:
        needs, plan = plan_for(placement, before, instances)
        traffic, old = Traffic(), pointers(store)
        brought = mover(4).carry_out(plan.moves, needs, placement.shape.tensor, store, traffic)
        check_contents(brought, placement, devices)
        assert (traffic.moved, traffic.loaded) == (plan.bytes_moved, plan.bytes_loaded)
        assert (traffic.loaded == 0) == (before is not None)
        new = pointers(brought)
        for device in brought.devices():
            for name, held in brought.at(device).items():
                kept = store.get(device, name)
                if kept is not None and kept.index == held.index and kept.buffer.shape == held.buffer.shape:
                    assert new[device, name] == old[device, name], "a buffer in place was copied"
        store, before = brought, placement


@settings(max_examples=25, deadline=None)
@given(first=placements(4, 2), second=placements(3, 2))
def test_what_a_lost_instance_had_alone_comes_from_the_checkpoint(first: Placement, second: Placement) -> None:
    devices = device_of(2)
    needs, plan = plan_for(first, None, fleet(4, 2))
    store = mover(2).carry_out(plan.moves, needs, first.shape.tensor, ShardStore({}), Traffic())
    lost = [held.buffer for ref in store.devices() if ref.instance == "i3" for held in store.at(ref).values()]
    left = store.without("i3")
    assert all(buffer.is_deleted() for buffer in lost)
    assert not any(ref.instance == "i3" for ref in left.devices())
    needs, plan = plan_for(second, first, fleet(4, 2, gone=["i3"]))
    assert not any(move.source is not None and move.source.instance == "i3" for move in plan.moves)
    traffic = Traffic()
    check_contents(mover(2).carry_out(plan.moves, needs, second.shape.tensor, left, traffic), second, devices)
    assert (traffic.moved, traffic.loaded) == (plan.bytes_moved, plan.bytes_loaded)


def missing_bytes(placement: Placement, before: Placement) -> int:
    """Bytes that are not where they are needed, counted array by array."""
    held = {
        device: slices_at(SPEC.parameters, SPEC, before.shape, before.layers, position)
        for position, device in before.devices.items()
    }
    missing = 0
    for position, device in placement.devices.items():
        for name, index in slices_at(SPEC.parameters, SPEC, placement.shape, placement.layers, position).items():
            common = intersect(index, held.get(device, {}).get(name, tuple((0, 0) for _ in index)))
            missing += _size(index) - (_size(common) if common else 0)
    return missing * 4


def _size(index: Sequence[tuple[int, int]]) -> int:
    return int(np.prod([stop - start for start, stop in index]))


def assignments(shape: MeshShape, instances: Sequence[Instance]) -> Iterator[Placement]:
    """Every way to put a shape on groups of neighbouring devices."""
    groups = [i.devices[n : n + shape.tensor] for i in instances for n in range(0, i.type.devices, shape.tensor)]
    groups = [group for group in groups if len(group) == shape.tensor]
    for chosen in itertools.permutations(groups, shape.data * shape.stage):
        for orders in itertools.product(itertools.permutations(range(shape.tensor)), repeat=len(chosen)):
            places = {
                Position(n // shape.stage, n % shape.stage, m): group[order[m]]
                for n, (group, order) in enumerate(zip(chosen, orders, strict=True))
                for m in range(shape.tensor)
            }
            yield Placement(2, shape, split_layers(SHARED_HEADS.layers, shape.stage), places)


@pytest.mark.parametrize(
    ("devices", "before", "after"),
    [
        (1, "2x2x1", "1x3x1"),
        (1, "1x3x1", "1x2x1"),
        (1, "1x2x1", "1x3x1"),
        (1, "1x3x1", "4x1x1"),
        (2, "1x3x2", "1x2x2"),
        (2, "1x2x2", "3x1x2"),
        (2, "1x2x1", "1x2x2"),
    ],
)
def test_bytes_moved_are_the_least_of_all_assignments(devices: int, before: str, after: str) -> None:
    instances = fleet(4 if devices == 1 else 3, devices)
    old_shape, new_shape = MeshShape.parse(before), MeshShape.parse(after)
    old = list(itertools.islice(assignments(old_shape, instances), 8))[-1]
    needs, plan = plan_for(old, None, instances)
    store = mover(devices).carry_out(plan.moves, needs, old_shape.tensor, ShardStore({}), Traffic())
    layers = split_layers(SHARED_HEADS.layers, new_shape.stage)
    places = match(new_shape, needs_of(SPEC, new_shape, layers, []), instances, Holdings.of(SPEC, old, [], instances))
    new = Placement(2, new_shape, layers, places)
    needs, plan = plan_for(new, old, instances)
    traffic = Traffic()
    brought = mover(devices).carry_out(plan.moves, needs, new_shape.tensor, store, traffic)
    check_contents(brought, new, device_of(devices))
    assert traffic.loaded == 0
    assert traffic.moved == missing_bytes(new, old)
    assert traffic.moved == min(missing_bytes(option, old) for option in assignments(new_shape, instances))


def test_a_plan_that_counts_on_what_is_not_there_is_refused() -> None:
    placement = next(assignments(MeshShape(1, 1, 2), fleet(1, 2)))
    needs, plan = plan_for(placement, placement, fleet(1, 2))
    assert not plan.moves
    with pytest.raises(SliceUnavailable, match=r"does not hold what of .* the plan leaves in place"):
        mover(2).carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())


def test_nothing_can_be_read_from_deleted_shards() -> None:
    placement = next(assignments(MeshShape(1, 1, 2), fleet(1, 2)))
    needs, plan = plan_for(placement, None, fleet(1, 2))
    assert all(move.phase is Phase.PRECOPY for move in plan.moves)
    store = mover(2).carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    held = store.at(DeviceRef("i0", 1))["layers.0.mlp.gate"]
    assert held.read(held.index).shape == (24, 25)
    left = store.without("i0")
    with pytest.raises(RuntimeError, match="deleted"):
        held.read(held.index)
    with pytest.raises(SliceUnavailable, match="i0/1 does not hold"):
        left.read(DeviceRef("i0", 1), ArraySlice("layers.0.mlp.gate", held.index))


def test_host_buffers_become_device_memory_without_a_copy() -> None:
    buffer = host_buffer((7, 33), np.dtype(np.float32))
    assert buffer.shape == (7, 33) and not buffer.any()
    assert jax.device_put(buffer, jax.devices()[2]).unsafe_buffer_pointer() == buffer.ctypes.data


@pytest.mark.parametrize("tensor", [2, 3])
def test_shards_of_one_array_differ_between_positions(tensor: int) -> None:
    """The contents checked above are able to tell one shard from another."""
    array = ARRAYS["layers.1.attention.key"]
    assert len({shard_index(array, SPEC, tensor, m) for m in range(tensor)}) == tensor


class Faltering:
    """A checkpoint one array of which cannot be read, until it is mended."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.done: list[ArraySlice] = []

    def read(self, name: str, index: Index) -> np.ndarray:
        if name == self.broken:
            raise CheckpointError("broken off")
        self.done.append(ArraySlice(name, index))
        return WEIGHTS.read(name, index)


def test_what_a_plan_that_was_cut_short_brought_is_not_brought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "READ_BYTES", 1)  # every shard by itself
    placement = pair()
    needs, plan = plan_for(placement, None, fleet(1, 2))
    devices, checkpoint = device_of(2), Faltering("norm.scale")
    bringing = ParameterMover(SPEC, np.dtype(np.float32), checkpoint, devices.__getitem__)
    with pytest.raises(CheckpointError, match="broken off"):
        bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    before, checkpoint.broken = list(checkpoint.done), ""
    assert {piece.name for piece in before} >= {"embedding", "layers.0.mlp.up"}
    store = bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    check_contents(store, placement, devices)
    wanted = Counter(move.slice for move in plan.moves)
    assert Counter(checkpoint.done) == wanted, "what was there is not read again"
    bringing.settle()
    checkpoint.done.clear()
    bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    assert Counter(checkpoint.done) == wanted, "after it was settled nothing is remembered"


class Unlucky:
    """A checkpoint during whose first reading something happens."""

    def __init__(self, happen: Callable[[], None]) -> None:
        self._happen: Callable[[], None] | None = happen

    def read(self, name: str, index: Index) -> np.ndarray:
        if self._happen is not None:
            self._happen, happen = None, self._happen
            happen()
        return WEIGHTS.read(name, index)


@pytest.mark.parametrize("read_bytes", [1, 1 << 30])
def test_nothing_of_an_instance_that_is_lost_meanwhile_is_taken_up_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(parameters, "READ_BYTES", read_bytes)
    monkeypatch.setattr(parameters, "STREAMS", 1)
    first, second = (next(assignments(MeshShape.parse(shape), fleet(2, 2))) for shape in ("1x1x2", "1x2x2"))
    needs, plan = plan_for(first, None, fleet(2, 2))
    devices, before = device_of(2), jax.live_arrays()
    store = mover(2).carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    (there,) = first.instances(0)

    def lose() -> None:
        for instance in ("i0", "i1"):
            store.without(instance)
            bringing.lose(instance)

    bringing = ParameterMover(SPEC, np.dtype(np.float32), Unlucky(lose), devices.__getitem__)
    needs, plan = plan_for(second, None, fleet(2, 2))
    with contextlib.suppress(RuntimeError):  # who reads what was deleted fails; who only keeps it does not
        bringing.carry_out(plan.moves, needs, 2, store, Traffic())
    del lose
    left = [array for array in jax.live_arrays() if not any(array is other for other in before)]
    assert not left, "something is left of instances that were lost"
    brought = bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    check_contents(brought, second, devices)
    assert there in {device.instance for device in brought.devices()}


class Bulk:
    """A checkpoint that reads many slices at once."""

    def __init__(self) -> None:
        self.calls: list[list[np.ndarray]] = []

    def read(self, name: str, index: Index) -> np.ndarray:
        raise AssertionError("one slice was read by itself")

    def read_into(self, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
        reads = list(wanted)
        for (name, index), target in reads:
            target[...] = WEIGHTS.read(name, index)
        self.calls.append([target for _, target in reads])


@pytest.mark.parametrize("read_bytes", [1, 10_000, 1 << 30])
def test_shards_are_read_many_at_once_into_the_memory_they_stay_in(
    monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(parameters, "READ_BYTES", read_bytes)
    placement, checkpoint = pair(), Bulk()
    needs, plan = plan_for(placement, None, fleet(1, 2))
    bringing = ParameterMover(SPEC, np.dtype(np.float32), checkpoint, device_of(2).__getitem__)
    store = bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    check_contents(store, placement, device_of(2))
    read = {target.ctypes.data for call in checkpoint.calls for target in call}
    assert read == set(pointers(store).values()), "something was copied"
    sizes = [sum(target.nbytes for target in call) for call in checkpoint.calls]
    largest = max(target.nbytes for call in checkpoint.calls for target in call)
    assert max(sizes) < read_bytes + largest
    assert len(sizes) <= 1 + sum(sizes) / read_bytes


@pytest.mark.parametrize("checkpoint", [WEIGHTS, Bulk()])
def test_parameters_are_of_the_type_that_was_asked_for(checkpoint: RandomCheckpoint | Bulk) -> None:
    placement = pair()
    needs, plan = plan_for(placement, None, fleet(1, 2))
    bringing = ParameterMover(SPEC, np.dtype(jnp.bfloat16), checkpoint, device_of(2).__getitem__)
    store = bringing.carry_out(plan.moves, needs, 2, ShardStore({}), Traffic())
    held = store.at(DeviceRef("i0", 1))["layers.1.mlp.down"]
    wanted = shard(WEIGHTS, ARRAYS["layers.1.mlp.down"], 2, 1).astype(jnp.bfloat16)
    assert held.buffer.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(held.buffer), wanted)


def pair() -> Placement:
    """One stage of two devices."""
    places = {Position(0, 0, m): DeviceRef("i0", m) for m in range(2)}
    return Placement(1, MeshShape(1, 1, 2), split_layers(SHARED_HEADS.layers, 1), places)


def test_what_a_plan_brings_whole_is_brought_though_the_device_has_it() -> None:
    placement = next(iter(assignments(MeshShape(1, 2, 1), fleet(2, 1))))
    needs, plan = plan_for(placement, None, fleet(2, 1))
    store = mover(1).carry_out(plan.moves, needs, 1, ShardStore({}), Traffic())
    traffic, before = Traffic(), pointers(store)
    again = mover(1).carry_out(plan.moves, needs, 1, store, traffic)
    assert traffic.loaded == plan.bytes_loaded > 0
    assert not set(before.values()) & set(pointers(again).values())
    check_contents(again, placement, device_of(1))
