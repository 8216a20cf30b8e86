"""Brings KV pages of running sequences to the stages that go on with them.

Of stages on several hosts of a TPU slice, every host moves what is on its own devices.

Pages are taken out of the old stage in groups of PAGES_PER_MOVE, re-cut where the tensor degree changes, and written
into the new stage's pages. All executables involved were compiled at boot. Between runtimes pages travel as host arrays
with all kv heads, each once, whatever the tensor degrees are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from spotjax.meshes.layout import tensor_range
from spotjax.meshes.sharding import replicated
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
    """Moves pages between stages of this process, and in and out of host memory."""

    def __init__(self, model: CompiledModel) -> None:
        self._model = model

    def move(self, transfer: PageTransfer, layer: int, source: Stage, target: Stage, traffic: Traffic) -> None:
        """Copies one layer's pages from ``source`` into ``target``, which it ``covers``."""
        read, write = self._model.read_pages(source.devices), self._model.write_pages(target.devices)
        traffic.moved += self._bytes_missing(source, target) * len(transfer.pages)
        source_pages = replicated(source.own_mesh)
        target_pages = replicated(target.own_mesh)
        for old, new in _groups(transfer.pages):
            with self._model.calls(source.devices):
                content = read(source.own_pages(layer), jax.device_put(old, source_pages))
            content = self._recut(content, source, target)
            chosen = jax.device_put(new, target_pages)
            with self._model.calls(target.devices):
                target.put_pages(layer, write(target.own_pages(layer), chosen, content))
            jax.block_until_ready(content)  # from here on the source is not needed

    def read(self, stage: Stage, layer: int, pages: Sequence[int], into: LayerPages[np.ndarray]) -> None:
        """Copies pages of one layer to host memory.

        Args:
          stage: has the layer.
          layer: of the model.
          pages: n page numbers.
          into: keys (n, K, H, G) and values (n, K, G, H); kv heads that are not here are left as they are.
        """
        for start in range(0, len(pages), PAGES_PER_MOVE):
            group = pages[start : start + PAGES_PER_MOVE]
            part = LayerPages(*(whole[start : start + len(group)] for whole in into))
            self.to_host(stage, self.take(stage, layer, group), len(group), part)

    def take(self, stage: Stage, layer: int, pages: Sequence[int]) -> LayerPages[jax.Array]:
        """Copies at most PAGES_PER_MOVE pages of one layer on their devices; returns before that is done."""
        chosen = np.zeros(PAGES_PER_MOVE, np.int32)
        chosen[: len(pages)] = pages
        read, sharding = self._model.read_pages(stage.devices), replicated(stage.own_mesh)
        with self._model.calls(stage.devices):
            return LayerPages(*read(stage.own_pages(layer), jax.device_put(chosen, sharding)))

    def to_host(self, stage: Stage, content: LayerPages[jax.Array], count: int, into: LayerPages[np.ndarray]) -> None:
        """Puts the first ``count`` pages that ``take`` took into host memory; shapes as in ``read``."""
        for whole, part in zip(into, content, strict=True):
            for (start, stop), shard in zip(self.heads(stage), _shards(part), strict=True):
                whole[:, start:stop] = shard[:count]

    def write(self, stage: Stage, layer: int, pages: Sequence[int], content: LayerPages[np.ndarray]) -> None:
        """Puts pages from host memory into one layer; shapes as in ``read``."""
        every, wanted = ((0, self._model.spec.config.kv_heads),), self.heads(stage)
        write, sharding, done = self._model.write_pages(stage.devices), replicated(stage.own_mesh), 0
        shardings = self._model.content_shardings(stage.own_mesh)
        for chosen, _ in _groups([(page, 0) for page in pages]):
            count = min(PAGES_PER_MOVE, len(pages) - done)
            parts = []
            for whole, at in zip(content, shardings, strict=True):
                group = np.zeros((PAGES_PER_MOVE, *whole.shape[1:]), whole.dtype)
                group[:count] = whole[done : done + count]
                parts.append(jax.device_put(_recut_heads([group], every, wanted), at))
            with self._model.calls(stage.devices):
                chosen_pages = jax.device_put(chosen, sharding)
                stage.put_pages(layer, write(stage.own_pages(layer), chosen_pages, LayerPages(*parts)))
            done += count

    def host_pages(self, layers: int, pages: int) -> tuple[np.ndarray, list[LayerPages[np.ndarray]]]:
        """Host memory for pages of some layers: one flat array of bytes, and the views of every layer into it."""
        c, size = self._model.spec.config, self._model.page_size
        flat = host_buffer((layers * 2 * pages * c.kv_heads * c.head_size * size,), self._model.dtype).view(np.uint8)
        return flat, self.page_views(flat, layers, pages, c.kv_heads)

    def page_views(self, flat: np.ndarray, layers: int, pages: int, heads: int) -> list[LayerPages[np.ndarray]]:
        """The views of every layer into bytes of that layout, with so many kv heads."""
        c, size = self._model.spec.config, self._model.page_size
        shapes = LayerPages((pages, heads, c.head_size, size), (pages, heads, size, c.head_size))
        split = flat.view(self._model.dtype).reshape(layers, 2, -1)
        return [LayerPages(*(part.reshape(shape) for part, shape in zip(both, shapes, strict=True))) for both in split]

    def heads(self, stage: Stage) -> tuple[Range, ...]:
        """The kv heads that each of this process's devices of a stage holds."""
        held = zip(stage.devices, head_ranges(self._model.spec, len(stage.devices)), strict=True)
        return tuple(heads for device, heads in held if device in stage.own)

    def covers(self, source: Stage, target: Stage) -> bool:
        """Whether this process's devices of ``source`` hold all kv heads that its devices of ``target`` must hold."""
        held = {head for heads in self.heads(source) for head in range(*heads)}
        return all(held.issuperset(range(*heads)) for heads in self.heads(target))

    def _recut(self, content: LayerPages[jax.Array], source: Stage, target: Stage) -> LayerPages[jax.Array]:
        """Content of the source stage's shards as the target stage's devices hold it."""
        held, wanted = self.heads(source), self.heads(target)
        shardings = self._model.content_shardings(target.own_mesh)
        if held == wanted:
            moved = jax.device_put(tuple(content), tuple(shardings))
            return LayerPages(*moved)
        return LayerPages(
            *(
                jax.device_put(_recut_heads(_shards(array), held, wanted), sharding)
                for array, sharding in zip(content, shardings, strict=True)
            )
        )

    def _bytes_missing(self, source: Stage, target: Stage) -> int:
        """Bytes of one page of one layer that the target's devices do not have already."""
        c = self._model.spec.config
        per_head = 2 * self._model.page_size * c.head_size * self._model.dtype.itemsize
        held = dict(zip(source.devices, head_ranges(self._model.spec, len(source.devices)), strict=True))
        missing = 0
        for device, (start, stop) in zip(target.own, self.heads(target), strict=True):
            have = held.get(device, (0, 0))
            missing += (stop - start) - max(0, min(stop, have[1]) - max(start, have[0]))
        return missing * per_head


def _shards(array: jax.Array) -> list[np.ndarray]:
    """The shards of an array split along axis 1, in order."""
    return [np.asarray(shard.data) for shard in sorted(array.addressable_shards, key=lambda s: s.index[1].start or 0)]


def _recut_heads(shards: Sequence[np.ndarray], held: Sequence[Range], wanted: Sequence[Range]) -> np.ndarray:
    """Re-cuts axis 1, kv heads, from the shards ``held`` to the shards ``wanted``, in host memory."""
    first = shards[0]
    heads = sum(stop - start for start, stop in wanted)
    cut = host_buffer((first.shape[0], heads, *first.shape[2:]), first.dtype)
    place = 0
    for start, stop in wanted:
        for head in range(start, stop):
            shard = next(m for m, (low, high) in enumerate(held) if low <= head < high)
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
