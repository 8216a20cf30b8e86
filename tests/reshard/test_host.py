"""Hosts that read from each other end up with exactly what one host with all devices has, whatever the change is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from serving_cases import BUCKETS, PAGE_SIZE, PAGES, SHARED_HEADS, shard, shared_heads

from spotjax.errors import PeerUnreachable, SliceUnavailable
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers, tensor_range
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Range
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Links
from spotjax.planner.migration import MigrationPlan, plan_migration
from spotjax.planner.needs import needs_of
from spotjax.reshard.host import Host
from spotjax.reshard.transfer import PageTransfer, Preparation
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage

NAMES = ("a", "b", "c")
PER_INSTANCE = 2
KIND = InstanceType("box", PER_INSTANCE, 1 << 40, 1e10, 1e10, 1e10, 1e9)
INSTANCES = [Instance(name, KIND) for name in NAMES]
LAYERS, HEADS, SIZE = SHARED_HEADS.layers, SHARED_HEADS.kv_heads, SHARED_HEADS.head_size
SHAPES = [MeshShape(d, p, m) for d in (1, 2) for p in (1, 2, 3) for m in (1, 2) if d * p * m <= 6]


@cache
def devices() -> Mapping[str, tuple[jax.Device, ...]]:
    every = jax.devices()
    return {
        name: tuple(every[PER_INSTANCE * n : PER_INSTANCE * (n + 1)]) for n, name in enumerate(NAMES)
    }  # fmt: skip


class Fellows:
    """Peers that are hosts in this process. What they refuse is an unreachable peer, as over the network."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.gone: set[str] = set()
        self.read: list[str] = []

    def read_slice(self, source: DeviceRef, wanted: ArraySlice, into: np.ndarray) -> None:
        assert into.flags.c_contiguous and into.flags.writeable
        into[...] = self._ask(source.instance, lambda host: host.store.read(source, wanted))

    def read_pages(self, instance: str, replica: int, layers: Range, pages: Sequence[int], into: np.ndarray) -> None:
        into[...] = self._ask(instance, lambda host: host.read_pages(replica, layers, pages))

    def read_backup(self, instance: str, layers: Range, owners: Sequence[tuple[int, int]], into: np.ndarray) -> None:
        raise AssertionError("nothing is backed up here")

    def _ask(self, instance: str, what: object) -> np.ndarray:
        if instance in self.gone:
            raise PeerUnreachable(instance, "it is gone")
        self.read.append(instance)
        try:
            return what(self.hosts[instance])  # type: ignore[operator,no-any-return]
        except SliceUnavailable as problem:
            raise PeerUnreachable(instance, problem) from problem


def host_of(names: Sequence[str], fellows: Fellows | None) -> Host:
    model, weights = shared_heads()
    host = Host(model, BUCKETS, weights, {name: devices()[name] for name in names}, fellows)
    host._compiled_for.update((1, 2))  # no step runs here
    return host


class Fleet:
    """One host with all devices, and one for each instance."""

    def __init__(self) -> None:
        self.fellows = Fellows()
        self.whole = host_of(NAMES, None)
        self.fellows.hosts = {name: host_of([name], self.fellows) for name in NAMES}
        self.current: Placement | None = None

    @property
    def hosts(self) -> Mapping[str, Host]:
        return self.fellows.hosts

    def plan(self, placement: Placement, heirs: Mapping[int, int]) -> Preparation:
        spec = shared_heads()[0].spec
        needs = {placement.devices[p]: n for p, n in needs_of(spec, placement.shape, placement.layers, ()).items()}
        holdings = Holdings.of(spec, self.current, (), INSTANCES, self.whole.held())
        return Preparation(placement, needs, plan_migration(needs, holdings, Links.of(INSTANCES)), heirs)

    def prepare(self, preparation: Preparation, *, again: bool = False) -> None:
        """``again``: hosts may have some of it from the last time."""
        loaded = self.whole.prepare(preparation, ())
        counted = []
        for name, host in self.hosts.items():
            host.placement = self.current  # as every worker is told
            transfers = tuple(t for t in preparation.plan.transfers if t.target.instance == name)
            needs = {device: needs for device, needs in preparation.needs.items() if device.instance == name}
            mine = Preparation(
                preparation.placement, needs, MigrationPlan(transfers, (), 0, 0, 0), preparation.heirs
            )  # fmt: skip
            counted.append(host.prepare(mine, ()))
        if not again:
            assert sum(one.loaded for one in counted) == loaded.loaded == preparation.plan.bytes_loaded
            assert sum(one.moved for one in counted) == loaded.moved == preparation.plan.bytes_moved

    def switch(self, early: Sequence[PageTransfer], late: Sequence[PageTransfer], *, twice: bool = False) -> None:
        for host in (self.whole, *self.hosts.values()):
            host.copy_pages(early)
        for _ in range(1 + twice):
            for host in (self.whole, *self.hosts.values()):
                host.switch(late)
        for host in (self.whole, *self.hosts.values()):
            host.adopt()
        self.current = self.whole.placement

    def stages(self) -> Iterator[tuple[tuple[int, int], Stage, Stage]]:
        """Every stage as the one host has it and as its own host has it."""
        apart = {place: stage for host in self.hosts.values() for place, stage in host.stages.items()}
        assert apart.keys() == self.whole.stages.keys()
        for place, stage in self.whole.stages.items():
            yield place, stage, apart[place]

    def fill(self, seed: int) -> dict[tuple[int, int], LayerPages[np.ndarray]]:
        """Random KV of every replica and layer, the same on all hosts."""
        model, _ = shared_heads()
        generator, written = np.random.default_rng(seed), {}
        for (data, _), *both in self.stages():
            for layer in range(*both[0].layers):
                shapes = (PAGES, HEADS, SIZE, PAGE_SIZE), (PAGES, HEADS, PAGE_SIZE, SIZE)
                content = LayerPages(*(generator.normal(size=shape).astype(np.float32) for shape in shapes))
                written[data, layer] = content
                for stage in both:
                    ranges = heads(len(stage.devices))
                    cut = [np.concatenate([part[:, a:b] for a, b in ranges], axis=1) for part in content]
                    at = model.content_shardings(stage.mesh)
                    stage.pages[layer] = tuple(jax.device_put(c, s) for c, s in zip(cut, at, strict=True))
        return written


def heads(tensor: int) -> list[Range]:
    spec = shared_heads()[0].spec
    return [tensor_range(HEADS, "kv_heads", spec, tensor, m) for m in range(tensor)]


def check_parameters(fleet: Fleet) -> None:
    """Every device holds what its place needs, taken from the checkpoint, on either side."""
    model, weights = shared_heads()
    placement = fleet.current
    assert placement is not None
    arrays = {array.name: array for array in model.spec.parameters}
    for position, device in placement.devices.items():
        mine, theirs = fleet.whole.store.at(device), fleet.hosts[device.instance].store.at(device)
        assert mine.keys() == theirs.keys() and mine
        for name, held in mine.items():
            expected = shard(weights, arrays[name], placement.shape.tensor, position.tensor)
            for one in (held, theirs[name]):
                assert one.index == held.index
                np.testing.assert_array_equal(np.asarray(one.buffer), expected)


def check_pages(
    fleet: Fleet, before: Mapping[tuple[int, int], LayerPages[np.ndarray]], transfers: Sequence[PageTransfer]
) -> None:
    """Pages that were handed over hold what they held before."""
    for (data, _), *both in fleet.stages():
        for transfer in (t for t in transfers if t.new == data and t.pages):
            old, new = (list(numbers) for numbers in zip(*transfer.pages, strict=True))
            for stage in both:
                ranges = dict(zip(stage.devices, heads(len(stage.devices)), strict=True))
                for layer in range(*stage.layers):
                    for array, content in zip(stage.pages[layer], before[transfer.old, layer], strict=True):
                        for part in array.addressable_shards:
                            start, stop = ranges[part.device]
                            np.testing.assert_array_equal(np.asarray(part.data)[new], content[old, start:stop])


@st.composite
def placements(draw: st.DrawFn, epoch: int) -> Placement:
    """Any mesh on any devices, a stage group within an instance; stages of a replica in any order of instances."""
    shape = draw(st.sampled_from(SHAPES))
    groups = [
        [DeviceRef(name, start + m) for m in range(shape.tensor)]
        for name in NAMES
        for start in range(0, PER_INSTANCE, shape.tensor)
    ]
    chosen = draw(st.permutations(groups))
    if shape.data * shape.stage > len(chosen):
        shape = MeshShape(1, shape.stage, shape.tensor)
    found = {
        Position(data, stage, m): chosen[data * shape.stage + stage][m]
        for data in range(shape.data)
        for stage in range(shape.stage)
        for m in range(shape.tensor)
    }
    return Placement(epoch, shape, split_layers(LAYERS, shape.stage), found)


@st.composite
def handovers(draw: st.DrawFn, old: int, new: int) -> tuple[dict[int, int], list[PageTransfer], list[PageTransfer]]:
    """Heirs, and pages that move early and late: every old replica's to one new replica, those of heirs in place."""
    heirs, early, late = {}, [], []
    for replica in range(old):
        target = draw(st.integers(0, new - 1))
        pages = draw(st.lists(st.integers(1, 10), unique=True, max_size=6))
        if target not in heirs.values():
            heirs[replica] = target
            moved = list(pages)
        else:
            moved = draw(st.permutations(range(11, 11 + len(pages))))
        pairs = list(zip(pages, moved, strict=True))
        cut = draw(st.integers(0, len(pairs))) if replica in heirs else 0  # only what goes on in place moves early
        early.append(PageTransfer(replica, target, tuple(pairs[:cut])))
        late.append(PageTransfer(replica, target, tuple(pairs[cut:])))
    return heirs, early, late


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(st.data(), st.integers(0, 99))
def test_parameters_and_kv_read_from_others_are_those_of_one_host(data: st.DataObject, seed: int) -> None:
    fleet = Fleet()
    fleet.prepare(fleet.plan(data.draw(placements(1)), {}))
    fleet.switch((), ())
    check_parameters(fleet)
    for epoch in (2, 3):
        assert fleet.current is not None
        before = fleet.fill(seed + epoch)
        placement = data.draw(placements(epoch))
        heirs, early, late = data.draw(handovers(fleet.current.shape.data, placement.shape.data))
        fleet.prepare(fleet.plan(placement, heirs))
        fleet.switch(early, late, twice=data.draw(st.booleans()))
        check_parameters(fleet)
        check_pages(fleet, before, [*early, *late])


def one_stage(name: str, epoch: int) -> Placement:
    devices = {Position(0, 0, 0): DeviceRef(name, 0)}
    return Placement(epoch, MeshShape(1, 1, 1), split_layers(LAYERS, 1), devices)


def interleaved(epoch: int) -> Placement:
    """Stages on a, b, a: what a has of the model is not one range of layers."""
    homes = (DeviceRef("a", 0), DeviceRef("b", 0), DeviceRef("a", 1))
    devices = {Position(0, stage, 0): home for stage, home in enumerate(homes)}
    return Placement(epoch, MeshShape(1, 3, 1), split_layers(LAYERS, 3), devices)


def test_layers_that_an_instance_has_not_in_one_run_are_read_run_by_run() -> None:
    fleet = Fleet()
    fleet.prepare(fleet.plan(interleaved(1), {}))
    fleet.switch((), ())
    before = fleet.fill(1)
    fleet.prepare(fleet.plan(one_stage("c", 2), {0: 0}))
    fleet.fellows.read.clear()
    transfers = [PageTransfer(0, 0, ((3, 3), (5, 5)))]
    fleet.switch((), transfers)
    check_pages(fleet, before, transfers)
    assert sorted(fleet.fellows.read) == ["a", "a", "b"]


def test_what_stays_in_place_is_read_from_nobody_and_is_the_same_buffer() -> None:
    fleet = Fleet()
    fleet.prepare(fleet.plan(interleaved(1), {}))
    fleet.switch((), ())
    host = fleet.hosts["a"]
    stored = {name: held.buffer for name, held in host.store.at(DeviceRef("a", 0)).items()}
    pages = {place: dict(stage.pages) for place, stage in host.stages.items()}
    fleet.fellows.read.clear()
    fleet.prepare(fleet.plan(interleaved(2), {0: 0}))
    fleet.switch((), [PageTransfer(0, 0, ((1, 1), (2, 2)))])
    assert not fleet.fellows.read
    assert all(host.store.at(DeviceRef("a", 0))[name].buffer is buffer for name, buffer in stored.items())
    assert {place: dict(stage.pages) for place, stage in host.stages.items()} == pages


@pytest.mark.parametrize("when", ["prepare", "copy", "switch"])
def test_a_peer_that_goes_leaves_the_current_mesh_and_another_change_can_follow(when: str) -> None:
    fleet = Fleet()
    fleet.prepare(fleet.plan(one_stage("a", 1), {}))
    fleet.switch((), ())
    before, transfers = fleet.fill(2), [PageTransfer(0, 0, ((4, 4),))]
    preparation, host = fleet.plan(one_stage("b", 2), {0: 0}), fleet.hosts["b"]
    if when == "prepare":
        fleet.fellows.gone.add("a")
        with pytest.raises(PeerUnreachable) as failed:
            fleet.prepare(preparation)
        assert host.prepared is None
    else:
        fleet.prepare(preparation)
        fleet.fellows.gone.add("a")
        with pytest.raises(PeerUnreachable) as failed:
            host.copy_pages(transfers) if when == "copy" else host.switch(transfers)
    assert failed.value.instance == "a"
    assert not host.stages
    fleet.fellows.gone.clear()
    fleet.prepare(preparation, again=True)
    fleet.switch((), transfers)
    check_parameters(fleet)
    check_pages(fleet, before, transfers)


def test_kv_that_is_not_here_is_refused() -> None:
    fleet = Fleet()
    fleet.prepare(fleet.plan(interleaved(1), {}))
    fleet.switch((), ())
    ours = [layer for stage in fleet.hosts["b"].stages.values() for layer in range(*stage.layers)]
    fleet.hosts["b"].read_pages(0, (ours[0], ours[-1] + 1), [1])
    for layers in ((0, 1), (ours[0], LAYERS)):
        with pytest.raises(SliceUnavailable, match="is not on this instance"):
            fleet.hosts["b"].read_pages(0, layers, [1])
    fleet.hosts["b"].clear()
    with pytest.raises(SliceUnavailable):
        fleet.hosts["b"].read_pages(0, (ours[0], ours[-1] + 1), [1])


def test_an_instance_that_is_back_under_its_name_goes_on_with_no_page_of_before() -> None:
    fleet = Fleet()
    host, placement = fleet.whole, interleaved(1)
    host.prepare(fleet.plan(placement, {}), ())
    host.adopt()
    fleet.current = placement.without("a")
    b = host.stages[0, 1]
    for stage in host.stages.values():
        for layer in range(*stage.layers):
            filled = [np.full((1, *part.shape[1:]), 7.0, np.float32) for part in stage.pages[layer]]
            host.kv.write(stage, layer, [3], LayerPages(*filled))
    host.lose("a")
    host.prepare(fleet.plan(interleaved(2), {0: 0}), ())
    host.switch(())
    host.adopt()
    assert host.placement == interleaved(2)
    for (_, number), stage in host.stages.items():
        for layer in range(*stage.layers):
            for pages in stage.pages[layer]:
                expected = 7.0 if number == 1 else 0.0
                np.testing.assert_array_equal(np.asarray(pages)[3], np.full(pages.shape[1:], expected))
    assert host.stages[0, 1].pages == b.pages, "who was not lost has its own"
    fleet.current = interleaved(2).without("b")
    host.lose("b")  # and this loss is not forgotten over the one before
    host.prepare(fleet.plan(interleaved(3), {0: 0}), ())
    host.switch(())
    host.adopt()
    assert all(not np.asarray(part).any() for layer in range(*b.layers) for part in host.stages[0, 1].pages[layer])
    arrays = {array.name: array for array in host.model.spec.parameters}
    for device in interleaved(3).devices.values():
        for name, held in host.store.at(device).items():
            expected = shard(shared_heads()[1], arrays[name], 1, 0)
            np.testing.assert_array_equal(np.asarray(held.buffer), expected)
