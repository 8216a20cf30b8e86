from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from planner_cases import PAGE_SIZE, Change, changes, fleet, kind, llama, placed
from test_matcher import most_bytes, small

from spotjax.errors import PlanError
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import ArraySlice, intersect, relative
from spotjax.meshes.stacks import arrays_in, in_stack
from spotjax.planner.holdings import Holdings, lost_cohorts
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence, cohort_of
from spotjax.planner.matcher import match
from spotjax.planner.migration import Direction, Link, Links, MigrationPlan, Phase, plan_migration
from spotjax.planner.needs import StackedNeeds, needs_of


def planned(change: Change):
    by_position = needs_of(change.spec, change.shape, change.after_layers, change.cohorts)
    matching = match(change.shape, by_position, change.hosts, change.holdings)
    needs = {device: by_position[position] for position, device in matching.items()}
    return needs, plan_migration(needs, change.holdings, Links.of(change.instances))


def logical_arrays(change: Change) -> dict[str, np.ndarray]:
    """Every parameter and every cohort's KV with a different number in each element."""
    layers = range(change.spec.config.layers)
    kv = [cohort.kv_array(change.spec, layer) for cohort in change.cohorts for layer in layers]
    arrays, start = {}, 1
    for array in (*change.spec.parameters, *kv):
        arrays[array.name] = np.arange(start, start + array.size).reshape(array.shape)
        start += array.size
    return arrays


def by_array(stacks) -> dict[str, list]:
    """Array name to the boxes of it that are among the boxes of its stack."""
    held: dict[str, list] = {}
    for stack, boxes in stacks.items():
        for piece in (piece for box in boxes for piece in arrays_in(ArraySlice(stack, box))):
            held.setdefault(piece.name, []).append(piece.index)
    return held


def holders(change: Change, piece: ArraySlice) -> list[DeviceRef]:
    """Devices that have at least some of a slice of an array."""
    stack, index = in_stack(piece)
    boxes = change.holdings.sources().get(stack, {})
    return [device for box, devices in boxes.items() if intersect(index, box) for device in devices]


def cut(array: np.ndarray, index) -> np.ndarray:
    return array[tuple(slice(*r) for r in index)]


@settings(max_examples=200)
@given(changes())
def test_carrying_out_the_plan_gives_every_position_exactly_its_slices(change: Change) -> None:
    needs, plan = planned(change)
    arrays = logical_arrays(change)
    alive = {i.name for i in change.instances if i.state is not InstanceState.GONE}
    store = {
        device: {
            name: [(box, cut(arrays[name], box).copy()) for box in boxes] for name, boxes in by_array(held).items()
        }
        for device, held in change.holdings.devices.items()
        if device.instance in alive
    }

    def read(device: DeviceRef, piece: ArraySlice) -> np.ndarray:
        for box, values in store[device][piece.name]:
            if all(b0 <= p0 and p1 <= b1 for (p0, p1), (b0, b1) in zip(piece.index, box, strict=True)):
                return values[relative(piece.index, box)]
        raise AssertionError(f"{device} does not have {piece}")

    built = {
        device: {n: np.zeros(ArraySlice(n, i).shape, int) for n, i in mine.items() if cohort_of(n) not in plan.lost}
        for device, mine in needs.items()
    }
    written = {device: {name: np.zeros_like(values) for name, values in mine.items()} for device, mine in built.items()}
    for device, mine in built.items():
        for name in mine:
            for box in by_array(change.holdings.at(device)).get(name, ()):
                common = tuple(
                    (max(a, b), max(min(c, d), max(a, b)))
                    for (a, c), (b, d) in zip(needs[device][name], box, strict=True)
                )
                into = relative(common, needs[device][name])
                if ArraySlice(name, common).size:
                    mine[name][into] = read(device, ArraySlice(name, common))
                    written[device][name][into] += 1
    for move in plan.moves:
        values = cut(arrays[move.slice.name], move.slice.index)
        if move.source is not None:
            assert move.source.instance in alive and move.source != move.target
            values = read(move.source, move.slice)
        assert move.bytes == values.size * change.spec.element_bytes(move.slice.name) > 0
        into = relative(move.slice.index, needs[move.target][move.slice.name])
        built[move.target][move.slice.name][into] = values
        written[move.target][move.slice.name][into] += 1
    for device, mine in built.items():
        for name, values in mine.items():
            assert (values == cut(arrays[name], needs[device][name])).all()
            assert (written[device][name] == 1).all()


@given(changes())
def test_bytes_add_up_and_a_checkpoint_serves_only_parameters_that_nobody_alive_has(change: Change) -> None:
    needs, plan = planned(change)
    wanted = sum(
        ArraySlice(n, i).size * change.spec.element_bytes(n)
        for mine in needs.values()
        for n, i in mine.items()
        if cohort_of(n) not in plan.lost
    )
    assert plan.bytes_in_place + plan.bytes_moved + plan.bytes_loaded == wanted
    for move in plan.moves:
        if move.source is None:
            assert cohort_of(move.slice.name) is None
            assert not holders(change, move.slice)


@given(changes())
def test_a_dying_holder_sends_only_what_no_lasting_one_has(change: Change) -> None:
    _, plan = planned(change)
    for move in plan.moves:
        if move.source is not None and move.source.instance in change.holdings.dying:
            assert all(device.instance in change.holdings.dying for device in holders(change, move.slice))


@given(changes())
def test_parameters_move_before_kv_and_front_layers_first(change: Change) -> None:
    _, plan = planned(change)
    phases = [move.phase for move in plan.moves]
    assert phases == sorted(phases, key=list(Phase).index)
    for phase in Phase:
        names = [move.slice.name for move in plan.moves if move.phase is phase]
        layers = [int(name.split("@")[0].split(".")[1]) for name in names if name.startswith(("layers.", "kv."))]
        assert layers == sorted(layers)
    assert all((move.phase is Phase.FINAL) == (cohort_of(move.slice.name) is not None) for move in plan.moves)


@given(changes())
def test_lost_cohorts_are_those_whose_kv_is_nowhere_in_full_and_none_of_it_moves(change: Change) -> None:
    needs, plan = planned(change)
    arrays = {c.name: [c.kv_array(change.spec, n) for n in range(change.spec.config.layers)] for c in change.cohorts}
    alive = [by_array(change.holdings.at(device)) for device in change.holdings.devices]
    lost = set()
    for cohort, kv in arrays.items():
        for array in kv:
            covered = np.zeros(array.shape, bool)
            for box in (box for held in alive for box in held.get(array.name, ())):
                covered[tuple(slice(*r) for r in box)] = True
            if not covered.all():
                lost.add(cohort)
    assert set(plan.lost) == lost == lost_cohorts(needs.values(), change.holdings)
    assert not any(cohort_of(move.slice.name) in lost for move in plan.moves)


@settings(max_examples=100)
@given(changes(sizes=(1, 2), most_instances=4).filter(small))
def test_no_matching_moves_fewer_bytes(change: Change) -> None:
    _, plan = planned(change)
    kept = tuple(cohort for cohort in change.cohorts if cohort.name not in plan.lost)
    change = replace(change, cohorts=kept)
    _, plan = planned(change)
    needs = needs_of(change.spec, change.shape, change.after_layers, kept)
    size = change.spec.element_bytes
    wanted = sum(ArraySlice(n, i).size * size(n) for mine in needs.values() for n, i in mine.items())
    assert plan.bytes_moved + plan.bytes_loaded == wanted - most_bytes(change, needs)


@given(changes())
def test_a_plan_cut_short_goes_on_from_what_has_arrived(change: Change) -> None:
    needs, plan = planned(change)
    half = plan.moves[: len(plan.moves) // 2]
    arrived = change.holdings.received((move.target, move.slice) for move in half)
    rest = plan_migration(needs, arrived, Links.of(change.instances))
    done = sum(move.bytes for move in half)
    assert rest.bytes_moved + rest.bytes_loaded == plan.bytes_moved + plan.bytes_loaded - done
    whole = change.holdings.received((move.target, move.slice) for move in plan.moves)
    assert plan_migration(needs, whole, Links.of(change.instances)).moves == ()


@given(changes())
def test_the_makespan_is_never_below_the_bound_and_links_carry_what_moves(change: Change) -> None:
    _, plan = planned(change)
    links = Links.of(change.instances)
    for phase in Phase:
        assert plan.seconds(phase) >= plan.lower_bound_seconds[phase] * (1 - 1e-9)
        for link, seconds in plan.link_seconds[phase].items():
            over = [m for m in plan.moves if m.phase is phase and link in Links.between(m.source, m.target)]
            assert seconds == pytest.approx(sum(links.seconds(link, move.bytes) for move in over))
    assert plan.makespan == pytest.approx(sum(plan.seconds(phase) for phase in Phase))


@given(changes())
def test_needs_by_array_make_the_same_plan_as_needs_by_stack(change: Change) -> None:
    needs, plan = planned(change)
    by_name = {device: {name: mine[name] for name in mine} for device, mine in needs.items()}
    assert plan_migration(by_name, change.holdings, Links.of(change.instances)).moves == plan.moves
    parts = [
        plan_migration(halves, change.holdings, Links.of(change.instances))
        for halves in (
            {device: mine.of_parameters() for device, mine in needs.items()},
            {device: mine.of_kv() for device, mine in needs.items()},
        )
    ]
    assert sum(part.bytes_moved for part in parts) == plan.bytes_moved


@given(changes())
def test_full_pages_of_kv_move_early_and_all_else_of_it_late(change: Change) -> None:
    needs, plan = planned(change)
    full = {cohort.name: cohort.full_pages // 2 for cohort in change.cohorts}
    early = plan_migration(needs, change.holdings, Links.of(change.instances), full_pages=full)
    assert (early.bytes_moved, early.bytes_loaded, early.lost) == (plan.bytes_moved, plan.bytes_loaded, plan.lost)
    for move in early.moves:
        cohort = cohort_of(move.slice.name)
        if cohort is not None:
            start, stop = move.slice.index[1]
            assert stop <= full[cohort] if move.phase is Phase.PRECOPY else start >= full[cohort]
    kinds = [(list(Phase).index(move.phase), cohort_of(move.slice.name) is not None) for move in early.moves]
    assert kinds == sorted(kinds)


def test_full_pages_are_those_that_are_filled_to_the_end() -> None:
    cohort = KvCohort(0, 0, (LiveSequence(0, 3, 9), LiveSequence(1, 1, 3), LiveSequence(2, 2, 8)), 4)
    assert (cohort.pages, cohort.full_pages) == (6, 4)


def test_needs_of_layers_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(PlanError, match=r"needs of layers\.\*\.x must be one index range in successive layers"):
        StackedNeeds.of({"layers.0.x": ((0, 1),), "layers.2.x": ((0, 1),)})


def test_an_unchanged_mesh_moves_nothing() -> None:
    spec, instances = llama(), fleet(2, 2)
    before = placed(spec, MeshShape(2, 1, 2), instances)
    plan = plan_for(spec, before.shape, before, instances, ())
    assert plan.moves == () and plan.bytes_in_place > 0 and plan.makespan == plan.lower_bound == 0


def plan_for(spec, shape, before, instances, cohorts) -> MigrationPlan:
    layers = placed(spec, shape, [i for i in instances if i.state is InstanceState.READY]).layers
    by_position = needs_of(spec, shape, layers, cohorts)
    holdings = Holdings.of(spec, before, cohorts, instances)
    matching = match(shape, by_position, [i for i in instances if i.state is InstanceState.READY], holdings)
    return plan_migration({d: by_position[p] for p, d in matching.items()}, holdings, Links.of(instances))


def test_two_holders_share_the_sending() -> None:
    spec, instances = llama(layers=5), fleet(1, 1, 1)
    before = placed(spec, MeshShape(2, 1, 1), instances[:2])
    plan = plan_for(spec, MeshShape(3, 1, 1), before, instances, ())
    sent = {name: sum(m.bytes for m in plan.moves if m.source == DeviceRef(name, 0)) for name in ("i0", "i1")}
    largest = max(move.bytes for move in plan.moves)
    assert abs(sent["i0"] - sent["i1"]) <= largest
    assert plan.bytes_moved == spec.parameter_bytes and plan.bytes_loaded == 0


def test_a_copy_inside_the_instance_carries_more_than_the_slower_network() -> None:
    spec = llama()
    instances = [Instance("a", kind(2)), Instance("b", kind(1))]
    before = placed(spec, MeshShape(2, 1, 1), [Instance("a", kind(1)), instances[1]])
    plan = plan_for(spec, MeshShape(3, 1, 1), before, instances, ())
    assert sum(move.bytes for move in plan.moves if move.source == DeviceRef("a", 0)) > 0.8 * plan.bytes_moved
    alone = Links.of(instances).seconds(Link("a", Direction.INSIDE), plan.bytes_moved)
    assert plan.makespan < alone


def test_a_cold_start_reads_everything_from_the_checkpoint() -> None:
    spec, instances = llama(), fleet(1, 2)
    plan = plan_for(spec, MeshShape(2, 1, 1), None, instances, ())
    assert plan.bytes_loaded == 2 * spec.parameter_bytes and plan.bytes_moved == plan.bytes_in_place == 0


def test_kv_of_a_noticed_instance_moves_in_the_final_phase() -> None:
    spec = llama(layers=2, heads=2, kv_heads=2)
    instances = fleet(1, 1)
    before = placed(spec, MeshShape(1, 1, 1), instances[:1])
    after = [replace(instances[0], state=InstanceState.NOTICED), instances[1]]
    cohort = KvCohort(0, 0, (LiveSequence(5, 3, 6),), PAGE_SIZE)
    plan = plan_for(spec, MeshShape(1, 1, 1), before, after, (cohort,))
    final = [move for move in plan.moves if move.phase is Phase.FINAL]
    assert [move.slice.name for move in final] == ["kv.0@0-0", "kv.1@0-0"]
    assert sum(move.bytes for move in final) == 3 * PAGE_SIZE * spec.kv_bytes_per_position
    assert plan.lost == () and plan.lower_bound == pytest.approx(plan.makespan)


def test_kv_of_a_lost_instance_is_reported_lost() -> None:
    spec, instances = llama(layers=2), fleet(1, 1)
    before = placed(spec, MeshShape(1, 1, 1), instances[:1])
    cohort = KvCohort(0, 0, (LiveSequence(5, 3, 6),), PAGE_SIZE)
    plan = plan_for(spec, MeshShape(1, 1, 1), before, instances[1:], (cohort,))
    assert plan.lost == ("0-0",) and plan.bytes_loaded == spec.parameter_bytes and plan.bytes_moved == 0


def test_a_dying_target_is_refused() -> None:
    spec, instances = llama(layers=1), fleet(1)
    holdings = Holdings({}, 4, dying=frozenset({"i0"}))
    needs = needs_of(spec, MeshShape(1, 1, 1), ((0, 1),), ())
    with pytest.raises(PlanError, match="i0/0 cannot be a target"):
        plan_migration({DeviceRef("i0", 0): next(iter(needs.values()))}, holdings, Links.of(instances))


def test_an_instance_of_unknown_type_is_refused() -> None:
    spec, instances = llama(layers=1), fleet(1, 1)
    before = placed(spec, MeshShape(1, 1, 1), instances[:1])
    holdings = Holdings.of(spec, before, (), instances)
    needs = needs_of(spec, MeshShape(1, 1, 1), ((0, 1),), ())
    with pytest.raises(PlanError, match="instance i0 sends or receives, but its type is not given"):
        plan_migration({DeviceRef("i1", 0): next(iter(needs.values()))}, holdings, Links.of(instances[1:]))
