"""Brings KV pages of running sequences to the stages that go on with them, while nothing decodes.

Pages are taken out of the old stage in groups of PAGES_PER_MOVE, re-cut where the tensor degree changes, and written
into the new stage's pages. All executables involved were compiled at boot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from spotjax.meshes.layout import tensor_range
from spotjax.meshes.sharding import replicated, stage_mesh
from spotjax.meshes.slices import Range
from spotjax.models.spec import ModelSpec
from spotjax.reshard.shards import host_buffer
from spotjax.reshard.transfer import PageTransfer, Traffic
from spotjax.runtime.compiled import PAGES_PER_MOVE, CompiledModel
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage


def head_ranges(spec: ModelSpec, tensor: int) -> tuple[Range, ...]:
    """The kv heads that each tensor shard holds."""
    return tuple(tensor_range(spec.config.kv_heads, "kv_heads", spec, tensor, m) for m in range(tensor))


class KvMover:
    """Moves pages between stages of this process."""

    def __init__(self, model: CompiledModel) -> None:
        self._model = model

    def move(self, transfer: PageTransfer, layer: int, source: Stage, target: Stage, traffic: Traffic) -> None:
        """Copies one layer's pages from ``source`` into ``target``."""
        read, write = self._model.read_pages(source.devices), self._model.write_pages(target.devices)
        traffic.moved += self._bytes_missing(source, target) * len(transfer.pages)
        source_pages = replicated(source.mesh)
        target_pages = replicated(target.mesh)
        for old, new in _groups(transfer.pages):
            with self._model.calls(source.devices):
                content = read(source.pages[layer], jax.device_put(old, source_pages))
            content = self._recut(content, len(source.devices), target)
            chosen = jax.device_put(new, target_pages)
            with self._model.calls(target.devices):
                target.pages[layer] = LayerPages(*write(target.pages[layer], chosen, content))

    def _recut(self, content: LayerPages[jax.Array], tensor: int, target: Stage) -> LayerPages[jax.Array]:
        """Content of ``tensor`` shards as the target stage's devices hold it."""
        held = head_ranges(self._model.spec, tensor)
        wanted = head_ranges(self._model.spec, len(target.devices))
        shardings = self._model.page_shardings(stage_mesh(target.devices))
        if held == wanted:
            moved = jax.device_put(tuple(content), tuple(shardings))
            return LayerPages(*moved)
        return LayerPages(
            *(
                jax.device_put(_recut_heads(array, held, wanted), sharding)
                for array, sharding in zip(content, shardings, strict=True)
            )
        )

    def _bytes_missing(self, source: Stage, target: Stage) -> int:
        """Bytes of one page of one layer that the target's devices do not have already."""
        c = self._model.spec.config
        per_head = 2 * self._model.page_size * c.head_size * self._model.dtype.itemsize
        held = dict(zip(source.devices, head_ranges(self._model.spec, len(source.devices)), strict=True))
        missing = 0
        wanted = head_ranges(self._model.spec, len(target.devices))
        for device, (start, stop) in zip(target.devices, wanted, strict=True):
            have = held.get(device, (0, 0))
            missing += (stop - start) - max(0, min(stop, have[1]) - max(start, have[0]))
        return missing * per_head


def _recut_heads(array: jax.Array, held: Sequence[Range], wanted: Sequence[Range]) -> np.ndarray:
    """Re-cuts axis 1, kv heads, from the shards ``held`` to the shards ``wanted``, in host memory."""
    shards = [np.asarray(shard.data) for shard in sorted(array.addressable_shards, key=lambda s: s.index[1].start or 0)]
    heads = sum(stop - start for start, stop in wanted)
    cut = host_buffer((array.shape[0], heads, *array.shape[2:]), np.dtype(array.dtype))
    place = 0
    for start, stop in wanted:
        for head in range(start, stop):
            shard = next(m for m, (first, last) in enumerate(held) if first <= head < last)
            cut[:, place] = shards[shard][:, head - held[shard][0]]
            place += 1
    return cut


def _groups(pages: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Old and new page numbers in groups of PAGES_PER_MOVE, padded with page 0, which nobody reads."""
    for start in range(0, len(pages), PAGES_PER_MOVE):
        group = np.zeros((2, PAGES_PER_MOVE), np.int32)
        part = np.array(pages[start : start + PAGES_PER_MOVE], np.int32).T
        group[:, : part.shape[1]] = part
        yield group[0], group[1]
