"""KV of stages on its way over the disk: what workers of one mesh saved goes on any other mesh, bit for bit."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from serving_cases import PAGE_SIZE, SHARED_HEADS, build_stage, shared_heads

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_format import KvFormat
from spotjax.checkpoint.saved_kv import SavedKv
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.reshard.kv import KvMover
from spotjax.runtime.kv import LayerPages

C = SHARED_HEADS
FORM = KvFormat("service", "weights", C.layers, C.kv_heads, C.head_size, PAGE_SIZE, "float32")
PAGES = {1: [5, 3, 20], 2: [8, 9]}
"""Of each sequence in the stages that save."""
POSITIONS = {1: 3 * PAGE_SIZE - 2, 2: 2 * PAGE_SIZE}
OWNERS = tuple(
    BackedUpPage(key, number, min(POSITIONS[key], (number + 1) * PAGE_SIZE))
    for key, pages in PAGES.items()
    for number in range(len(pages))
)


def logical(layer: int, pages: int) -> LayerPages[np.ndarray]:
    """Random pages of a layer, all kv heads."""
    generator = np.random.default_rng(layer)
    keys = generator.normal(size=(pages, C.kv_heads, C.head_size, PAGE_SIZE)).astype(np.float32)
    return LayerPages(keys, generator.normal(size=(pages, C.kv_heads, PAGE_SIZE, C.head_size)).astype(np.float32))


def save_stage(directory: Path, number: int, stages: int, devices: list[jax.Device]) -> None:
    """A worker with one stage saves all that the stage has computed."""
    model, weights = shared_heads()
    stage, mover = build_stage(model, weights, devices, stages, number), KvMover(model)
    used = [page for pages in PAGES.values() for page in pages]
    for layer in range(*stage.layers):
        mover.write(stage, layer, used, logical(layer, len(used)))
    writer = KvWriter(directory, f"worker-{number}", FORM)
    flat, views = mover.host_pages(stage.layers[1] - stage.layers[0], len(used))
    for layer, view in zip(range(*stage.layers), views, strict=True):
        mover.read(stage, layer, used, view)
    writer.put(BackupHeader(stage.layers, OWNERS, f"worker-{number}", 1, FORM.service), flat)
    writer.flush()
    writer.close()


@pytest.mark.parametrize(
    ("stages", "tensor", "onto"), [(2, 2, 1), (1, 3, 2), (3, 1, 6)], ids=["1x2x2", "1x1x3", "1x3x1"]
)
def test_what_one_mesh_saved_goes_on_any_other(tmp_path: Path, stages: int, tensor: int, onto: int) -> None:
    for number in range(stages):
        save_stage(tmp_path, number, stages, jax.devices()[:tensor])
    saved = SavedKv(tmp_path, FORM, limit=POSITIONS)
    assert saved.positions((0, C.layers), list(PAGES)) == tuple(POSITIONS.values())
    model, weights = shared_heads()
    mover, target = KvMover(model), build_stage(model, weights, jax.devices()[:onto], stages=1, number=0)
    onto_pages = [11, 2, 7, 30, 1]
    flat = saved.read((0, C.layers), [(page.sequence, page.number) for page in OWNERS])
    for layer, content in enumerate(mover.page_views(flat, C.layers, len(OWNERS), C.kv_heads)):
        mover.write(target, layer, onto_pages, content)
        expected, there = logical(layer, len(OWNERS)), mover.host_pages(1, len(OWNERS))[1][0]
        mover.read(target, layer, onto_pages, there)
        for got, wanted in zip(there, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
