"""Keeps a worker's parameters in memory-mapped files, where they outlive its process.

Owns the files and their format; ``store_directory`` has their directories and locks. Knows neither models nor devices:
on the CPU backend ``jax.device_put`` takes the memory of a content over without a copy, on others it copies.

A store is a directory of one file per shard. A file is named ``*.shard`` by a rename once it is complete, so a process
that dies while it writes leaves a file of another name, which the next one removes. A file is the checksum of all that
follows, the length of the header, the header (msgpack), zeros up to the next page, and the content.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import struct
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from weakref import finalize

import ml_dtypes  # noqa: F401  # gives numpy the names of bfloat16 and its like
import msgspec
import numpy as np
import xxhash

from spotjax.errors import ConfigError
from spotjax.meshes.slices import Index
from spotjax.reshard.store_directory import SHARD, UNFINISHED, acquire, remove_store, store_files, store_path

log = logging.getLogger(__name__)

Key = tuple[int, str, Index]
"""Which shard: the device's number in its instance, the array's name, what of the array the shard holds."""

FORMAT = 1
"""Counts changes of the file format; files of another format are those of another model."""

PAGE = 4096
MADV_POPULATE_WRITE = 23
"""Of madvise(2), since Linux 5.14; older ones refuse it, and pages are mapped when they are written."""
CHECKSUM_BYTES = 16
START = struct.Struct(f"<{CHECKSUM_BYTES}sI")
"""Checksum (xxh3, 128 bits) of everything behind it, length of the header in bytes."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What a file holds. ``shape`` includes padding, which ``index`` does not."""

    device: int
    name: str
    index: Index
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> Key:
        """Which shard it is."""
        return self.device, self.name, self.index


class StoredShard:
    """One shard's memory. It stays valid as long as anything refers to ``content``, whatever becomes of the file.

    Attributes:
      key: which shard.
      content: array over the file's memory, on a page boundary; read-only once sealed.
    """

    def __init__(self, header: Header, mapping: mmap.mmap, start: int, sealed: Path, unfinished: Path | None) -> None:
        self.key = header.key
        self.content = np.ndarray(header.shape, np.dtype(header.dtype), mapping, start)
        self._mapping, self._sealed, self._unfinished = mapping, sealed, unfinished

    def seal(self) -> None:
        """Makes the shard one that later processes find, in place of an earlier one of the same key, in one step.

        Whatever holds other references to the content's memory must not write it any more.
        """
        assert self._unfinished is not None, "a shard is sealed once"
        self.content.flags.writeable = False
        self._mapping[:CHECKSUM_BYTES] = checksum(self._mapping)
        os.replace(self._unfinished, self._sealed)
        self._unfinished = None

    def discard(self) -> None:
        """Removes the file; for a shard that could not be completed."""
        (self._unfinished or self._sealed).unlink(missing_ok=True)


class ParameterStore:
    """The shards of one instance and one model. One process at a time has it; ``open`` makes one."""

    def __init__(self, path: Path, prefix: str, lock: int) -> None:
        self._path, self._prefix = path, prefix
        self._unlock = finalize(self, os.close, lock)

    @classmethod
    def open(cls, directory: Path, instance: str, fingerprint: str, patience: float = 2.0) -> ParameterStore:
        """The store of an instance, with what earlier processes sealed under the same fingerprint and nothing else.

        Raises this process's limit of open files as far as it may: Python keeps one open for every mapping.

        Args:
          directory: where stores are; made if missing.
          instance: any name.
          fingerprint: of all that decides contents: the model's weights and the type of parameters.
          patience: seconds to wait for a process that is just ending.

        Raises:
          ConfigError: another live process has the store, or there can be none in that directory.
        """
        path = store_path(directory, instance)
        try:
            store = cls(path, digest(f"{FORMAT}\n{fingerprint}".encode()), acquire(path, patience))
            path.chmod(0o700)
            allow_open_files()
            store._clean()
        except BlockingIOError:
            raise ConfigError(
                f"another live process is instance {instance!r}: it holds {path}; stop it or give this one another name"
            ) from None
        except OSError as problem:
            raise ConfigError(
                f"cannot keep parameters in {directory}: {problem}; choose another directory for them, or none"
            ) from problem
        return store

    def allocate(self, device: int, name: str, index: Index, shape: tuple[int, ...], dtype: np.dtype) -> StoredShard:
        """Memory for a shard: zeros, all of it there at once, so that writing it cannot fail.

        Raises:
          OSError: there is no room. What is stored is as it was.
        """
        header = Header(device, name, index, shape, dtype.name)
        encoded = msgspec.msgpack.encode(header)
        start = first_page(len(encoded))
        size = start + prod(shape) * dtype.itemsize
        descriptor, unfinished = tempfile.mkstemp(UNFINISHED, dir=self._path)
        try:
            reserve(descriptor, size)
            mapping = mmap.mmap(descriptor, size)
            populate(mapping)
        except OSError as problem:
            os.unlink(unfinished)
            message = f"no room for {size} bytes of parameters ({problem.strerror})"
            raise OSError(problem.errno, message, str(self._path)) from problem
        finally:
            os.close(descriptor)
        mapping[: START.size + len(encoded)] = START.pack(b"", len(encoded)) + encoded
        return StoredShard(header, mapping, start, self._file(header.key), Path(unfinished))

    def attached(self) -> list[StoredShard]:
        """Every sealed shard, earlier processes' included. Reads all of them to verify their checksums.

        A damaged one is removed, with a warning in the log.
        """
        with ThreadPoolExecutor(thread_name_prefix="attach") as pool:
            shards = pool.map(self._attach, sorted(self._path.glob(f"*{SHARD}")))
            return [shard for shard in shards if shard is not None]

    def keep(self, wanted: Collection[Key]) -> None:
        """Removes every other sealed shard. The memory of those in use is freed when the last reference is dropped."""
        files = {self._file(key) for key in wanted}
        for file in self._path.glob(f"*{SHARD}"):
            if file not in files:
                file.unlink(missing_ok=True)

    def room(self) -> int:
        """Bytes that are free where the store is; what other processes take meanwhile is not known."""
        system = os.statvfs(self._path)
        return system.f_bavail * system.f_frsize

    def close(self) -> None:
        """Lets another process have the store. The shards stay."""
        self._unlock()

    def remove(self) -> None:
        """Removes the store; contents in use stay valid. For an instance that ends for good.

        Raises:
          OSError: somebody put other files into its directory.
        """
        remove_store(self._path)
        self.close()

    def _file(self, key: Key) -> Path:
        return self._path / f"{self._prefix}-{digest(msgspec.msgpack.encode(key))}{SHARD}"

    def _clean(self) -> None:
        """Removes what belongs to other models, and what is unfinished, which has no model's prefix."""
        for file in store_files(self._path):
            if not file.name.startswith(self._prefix):
                file.unlink(missing_ok=True)

    def _attach(self, file: Path) -> StoredShard | None:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size >= PAGE:
                mapping = mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ)
                expected, length = START.unpack_from(mapping)
                if checksum(mapping) == expected:
                    header = msgspec.msgpack.decode(mapping[START.size : START.size + length], type=Header)
                    return StoredShard(header, mapping, first_page(length), file, None)
        log.warning("parameters in %s are damaged and will be loaded again", file)
        file.unlink(missing_ok=True)
        return None


def reserve(descriptor: int, size: int) -> None:
    """Makes the file that long, with memory behind all of it: a full tmpfs ends whoever writes a hole with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        with open(descriptor, "wb", closefd=False) as file:
            for start in range(0, size, 1 << 20):
                file.write(bytes(min(size - start, 1 << 20)))


def populate(mapping: mmap.mmap) -> None:
    """Maps all pages at once, if the system can: writing them one fault at a time takes half as long again.

    Not by ``mmap``'s own flag, under which Python would hold its lock meanwhile, and every step would wait.
    """
    if sys.platform == "linux":
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(mapping)), MADV_POPULATE_WRITE)


def allow_open_files() -> None:
    """Lets this process have as many files open as it may have mappings (Linux: 65530 unless set otherwise)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def checksum(mapping: mmap.mmap) -> bytes:
    """Of all of a file but the checksum itself."""
    with memoryview(mapping) as whole, whole[CHECKSUM_BYTES:] as content:
        return xxhash.xxh3_128_digest(content)


def first_page(header: int) -> int:
    """Where the content begins, behind a header of that many bytes."""
    return -(-(START.size + header) // PAGE) * PAGE


def digest(subject: bytes) -> str:
    """A short name for something long."""
    return xxhash.xxh3_128_hexdigest(subject)
