"""Reads from other workers and from the other hosts of this worker's own TPU slice. A ``reshard.peers.Peers``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Range
from spotjax.protocol import reads
from spotjax.reshard.host import Host
from spotjax.reshard.kv import head_ranges
from spotjax.worker.peers import RemotePeers
from spotjax.worker.slice_executor import SliceExecutor
from spotjax.worker.slice_hosts import SliceHosts
from spotjax.worker.slice_messages import ReadHeads


class SlicePeers(RemotePeers):
    """Other workers by name; under this one's own name, the hosts of this slice.

    Attributes:
      hosts: all of them.
      host, executor: what this one has, once there is a model.
    """

    hosts: SliceHosts
    host: Host
    executor: SliceExecutor

    def read_slice(self, source: DeviceRef, wanted: ArraySlice, into: np.ndarray) -> None:
        """See ``Peers.read_slice``."""
        if source.instance == self._name:
            what = reads.ReadSlice(source.index, wanted.name, wanted.index)
            self._read_host(self.hosts.of(source.index), what, into)
        else:
            super().read_slice(source, wanted, into)

    def read_pages(self, instance: str, replica: int, layers: Range, pages: Sequence[int], into: np.ndarray) -> None:
        """See ``Peers.read_pages``."""
        if instance != self._name:
            super().read_pages(instance, replica, layers, pages, into)
            return
        kv = self.host.kv
        whole = kv.page_views(into, layers[1] - layers[0], len(pages), self.host.model.spec.config.kv_heads)
        for number, heads in self._heads_by_host(replica, layers).items():
            if number == self.hosts.number:
                content = self.own_heads(replica, layers, pages, heads)
            else:
                content = np.empty(into.nbytes // self.host.model.spec.config.kv_heads * len(heads), np.uint8)
                what = ReadHeads(self._current_epoch(), replica, layers, tuple(pages), tuple(heads))
                self._read_host(number, what, content)
            some = kv.page_views(content, layers[1] - layers[0], len(pages), len(heads))
            for into_layer, layer in zip(whole, some, strict=True):
                for target, part in zip(into_layer, layer, strict=True):
                    target[:, heads] = part

    def read_backup(self, instance: str, layers: Range, owners: Sequence[tuple[int, int]], into: np.ndarray) -> None:
        """See ``Peers.read_backup``; backups are kept at host 0."""
        if instance == self._name and self.hosts.number:
            self._read_host(0, reads.ReadBackup(layers, tuple(owners)), into)
        else:
            super().read_backup(instance, layers, owners, into)

    def own_heads(self, replica: int, layers: Range, pages: Sequence[int], heads: Sequence[int]) -> np.ndarray:
        """Some of the kv heads on this host of pages of a replica's current stage, as bytes."""
        self.executor.settle()
        kv, count = self.host.kv, layers[1] - layers[0]
        content = self.host.read_pages(replica, layers, pages)
        views = kv.page_views(content, count, len(pages), self.host.model.spec.config.kv_heads)
        parts = [part[:, list(heads)].reshape(-1) for layer in views for part in layer]
        return np.concatenate(parts).view(np.uint8)

    def _heads_by_host(self, replica: int, layers: Range) -> dict[int, list[int]]:
        """Where each kv head of some layers of a replica of the current placement is, once."""
        placement = self.host.placement
        if placement is None:
            raise SliceUnavailable(f"layer {layers[0]} of replica {replica} is not on this instance any more")
        number = next(n for n, (start, stop) in enumerate(placement.layers) if start <= layers[0] < stop)
        group = placement.group(replica, number)
        found: dict[int, list[int]] = {}
        seen: set[int] = set()
        for device, heads in zip(group, head_ranges(self.host.model.spec, len(group)), strict=True):
            new = [head for head in range(*heads) if head not in seen]
            found.setdefault(self.hosts.of(device.index), []).extend(new)
            seen.update(new)
        return {number: heads for number, heads in found.items() if heads}

    def _current_epoch(self) -> int:
        return self.host.placement.epoch if self.host.placement is not None else 0

    def _read_host(self, number: int, what: Any, into: np.ndarray) -> None:
        """From another host of this slice. Wanted by other workers, too, so a new command puts no end to it."""
        content = memoryview(into.reshape(-1).view(np.uint8))
        if content.nbytes:
            address = self.hosts.addresses[number]
            fetching = self._endpoint.fetch(address, reads.encode(what), content, self._timeout)
            asyncio.run_coroutine_threadsafe(fetching, self._loop).result()
