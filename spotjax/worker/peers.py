"""Reads from other workers over the data plane, for code that runs in threads. A ``reshard.peers.Peers``."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Mapping, Sequence

import numpy as np

from spotjax.errors import PeerUnreachable, TransportError
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Range
from spotjax.protocol import reads
from spotjax.transport.endpoint import Endpoint
from spotjax.worker.copies import Copies


class RemotePeers:
    """The other workers.

    Args:
      name: of this instance.
      copies: what this worker has itself of others' KV.
      endpoint: of this process.
      loop: the endpoint's.
      timeout: seconds without progress after which a peer counts as unreachable.

    Attributes:
      addresses: data endpoint by instance; changes with every command that brings new ones.
      epoch: of the placement that KV is read of.
    """

    def __init__(
        self, name: str, copies: Copies, endpoint: Endpoint, loop: asyncio.AbstractEventLoop, timeout: float
    ) -> None:
        self.addresses: Mapping[str, str] = {}
        self.epoch = 0
        self._name, self._copies = name, copies
        self._endpoint, self._loop, self._timeout = endpoint, loop, timeout
        self._superseded = False
        self._reading: set[concurrent.futures.Future[None]] = set()

    def begin(self) -> None:
        """Reads are wanted again."""
        self._superseded = False

    def supersede(self) -> None:
        """Ends all reads, and those that begin before ``begin``: what they are for is of no use any more."""
        self._superseded = True
        for reading in list(self._reading):
            reading.cancel()

    def read_slice(self, source: DeviceRef, wanted: ArraySlice, into: np.ndarray) -> None:
        """See ``Peers.read_slice``."""
        self._read(source.instance, reads.ReadSlice(source.index, wanted.name, wanted.index), into)

    def read_pages(self, instance: str, replica: int, layers: Range, pages: Sequence[int], into: np.ndarray) -> None:
        """See ``Peers.read_pages``."""
        self._read(instance, reads.ReadPages(self.epoch, replica, layers, tuple(pages)), into)

    def read_backup(self, instance: str, layers: Range, owners: Sequence[tuple[int, int]], into: np.ndarray) -> None:
        """See ``Peers.read_backup``. Pages that are here as a whole come from here: a checkpoint is everybody's."""
        if instance == self._name:
            into[...] = self._copies.read(layers, owners)
            return
        here = self._copies.whole(layers, owners)
        if not any(here):
            self._read(instance, reads.ReadBackup(layers, tuple(owners)), into)
            return
        pages = into.reshape(layers[1] - layers[0], 2, len(owners), -1)
        near, far = ([n for n, whole in enumerate(here) if whole is which] for which in (True, False))
        content = self._copies.read(layers, [owners[n] for n in near])
        pages[:, :, near] = content.reshape(*pages.shape[:2], len(near), -1)
        if far:
            fetched = np.empty((*pages.shape[:2], len(far), pages.shape[-1]), np.uint8)
            self._read(instance, reads.ReadBackup(layers, tuple(owners[n] for n in far)), fetched)
            pages[:, :, far] = fetched

    def _read(self, instance: str, what: reads.Read, into: np.ndarray) -> None:
        if not into.nbytes:
            return
        content = into.reshape(-1).view(np.uint8)
        if self._superseded:
            raise PeerUnreachable("", "the command was superseded")
        if instance not in self.addresses:
            raise PeerUnreachable(instance, "its address is not known")
        fetching = self._endpoint.fetch(
            self.addresses[instance], reads.encode(what), memoryview(content), self._timeout
        )
        reading = asyncio.run_coroutine_threadsafe(fetching, self._loop)
        self._reading.add(reading)
        if self._superseded:  # just now, and this one was not among those that were cancelled
            reading.cancel()
        try:
            reading.result()
        except concurrent.futures.CancelledError:
            raise PeerUnreachable("", "the command was superseded") from None
        except TransportError as error:
            raise PeerUnreachable(instance, error) from error
        finally:
            self._reading.discard(reading)
