"""KV pages on their way between stages: exact contents across tensor degrees, and the bytes that the plan says."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from serving_cases import PAGE_SIZE, PAGES, SHARED_HEADS, build_stage, shared_heads

from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.planner.links import Links
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import needs_of
from spotjax.reshard.kv import KvMover, head_ranges
from spotjax.reshard.transfer import PageTransfer, Traffic
from spotjax.runtime.compiled import PAGES_PER_MOVE
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage

HEADS, SIZE = SHARED_HEADS.kv_heads, SHARED_HEADS.head_size


def stage_on(numbers: Sequence[int]) -> Stage:
    """The whole model as one stage on the devices of those numbers."""
    model, weights = shared_heads()
    return build_stage(model, weights, [jax.devices()[number] for number in numbers], stages=1, number=0)


def logical(seed: int) -> LayerPages[np.ndarray]:
    """Random keys and values of all pages and all kv heads."""
    generator = np.random.default_rng(seed)
    keys = generator.normal(size=(PAGES, HEADS, SIZE, PAGE_SIZE)).astype(np.float32)
    values = generator.normal(size=(PAGES, HEADS, PAGE_SIZE, SIZE)).astype(np.float32)
    return LayerPages(keys, values)


def put(stage: Stage, layer: int, content: LayerPages[np.ndarray]) -> None:
    """Makes ``content`` the pages of one layer, each shard with its heads."""
    model, _ = shared_heads()
    ranges = head_ranges(model.spec, len(stage.devices))
    stacked = [np.concatenate([part[:, start:stop] for start, stop in ranges], axis=1) for part in content]
    shardings = model.content_shardings(stage.mesh)
    stage.pages[layer] = tuple(jax.device_put(s, at) for s, at in zip(stacked, shardings, strict=True))


def check(stage: Stage, layer: int, pages: Sequence[int], content: LayerPages[np.ndarray]) -> None:
    """Asserts that every shard has its heads of ``content`` in those pages."""
    ranges = dict(zip(stage.devices, head_ranges(shared_heads()[0].spec, len(stage.devices)), strict=True))
    for array, expected in zip(stage.pages[layer], content, strict=True):
        for part in array.addressable_shards:
            start, stop = ranges[part.device]
            np.testing.assert_array_equal(np.asarray(part.data)[list(pages)], expected[:, start:stop])


def picked(content: LayerPages[np.ndarray], pages: Sequence[int]) -> LayerPages[np.ndarray]:
    return LayerPages(content.keys[list(pages)], content.values[list(pages)])


def test_contents_survive_every_change_of_the_tensor_degree() -> None:
    content = {layer: logical(layer) for layer in range(SHARED_HEADS.layers)}
    source = stage_on([0])
    for layer in content:
        put(source, layer, content[layer])
    pages = list(range(1, 4 + PAGES_PER_MOVE))  # more than one group
    original, mover = list(pages), KvMover(shared_heads()[0])
    generator = np.random.default_rng(0)
    for devices in ([1, 2], [3, 4, 5], [7, 6, 2, 1], [4, 0], [0, 1, 2, 3, 4, 5], [6]):
        target = stage_on(devices)
        moved_to = (1 + generator.permutation(PAGES - 1)[: len(pages)]).tolist()
        transfer = PageTransfer(0, 0, tuple(zip(pages, moved_to, strict=True)))
        for layer in content:
            mover.move(transfer, layer, source, target, Traffic())
            check(target, layer, moved_to, picked(content[layer], original))
            check(source, layer, pages, picked(content[layer], original))
        source, pages = target, moved_to


def test_pages_that_are_not_moved_stay_as_they_are() -> None:
    source, target = stage_on([0, 1]), stage_on([2, 3, 4])
    arriving, present = logical(1), logical(2)
    put(source, 0, arriving)
    put(target, 0, present)
    KvMover(shared_heads()[0]).move(PageTransfer(0, 0, ((3, 9), (8, 4))), 0, source, target, Traffic())
    check(target, 0, [9, 4], picked(arriving, [3, 8]))
    others = [page for page in range(1, PAGES) if page not in (9, 4)]
    check(target, 0, others, picked(present, others))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([0], [1]),
        ([0, 1], [1, 0]),
        ([0, 1], [2, 3]),
        ([0], [0, 1]),
        ([0, 1], [0]),
        ([0, 1], [0, 1, 2]),
        ([0, 1, 2], [2, 1]),
        ([0, 1, 2, 3, 4, 5], [5, 0, 1]),
        ([2, 3, 4], [2, 3, 4, 0, 1, 5]),
    ],
)
def test_bytes_moved_equal_the_plan(old: list[int], new: list[int]) -> None:
    model, _ = shared_heads()
    instances = [Instance("box", InstanceType("box", 8, 1 << 40, 1e10, 1e10, 1e10, 1e9))]

    def placement(numbers: list[int]) -> Placement:
        shape = MeshShape(1, 1, len(numbers))
        devices = {Position(0, 0, m): DeviceRef("box", number) for m, number in enumerate(numbers)}
        return Placement(1, shape, split_layers(SHARED_HEADS.layers, 1), devices)

    live = (LiveSequence(1, 3, 20), LiveSequence(2, 2, 16))
    cohort = KvCohort(0, 0, live, PAGE_SIZE)
    before, after = placement(old), placement(new)
    needs = {
        after.devices[position]: arrays.of_kv()
        for position, arrays in needs_of(model.spec, after.shape, after.layers, [cohort]).items()
    }
    plan = plan_migration(needs, Holdings.of(model.spec, before, [cohort], instances), Links.of(instances))
    traffic, mover = Traffic(), KvMover(model)
    source, target = stage_on(old), stage_on(new)
    pages = tuple((page, page + 7) for page in range(1, 6))
    for layer in range(SHARED_HEADS.layers):
        content = logical(layer)
        put(source, layer, content)
        mover.move(PageTransfer(0, 0, pages), layer, source, target, traffic)
        check(target, layer, [new for _, new in pages], picked(content, [old for old, _ in pages]))
    assert (traffic.moved, traffic.loaded) == (plan.bytes_moved, 0)
    assert plan.bytes_loaded == 0 and not plan.lost
