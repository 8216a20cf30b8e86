"""Compiled functions: each is compiled once and then put on any devices in milliseconds.

A mesh change moves stages to other devices, and XLA ties an executable to the devices it was compiled for. Compiling
again would cost seconds in the middle of a preemption. So the first compilation of a function is kept in serialized
form, and other device groups of the same size load it (about 3 ms on CPU instead of 100 ms and more). Where the
backend cannot do that, the function is compiled for the new devices.

Safe to use from several threads.
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax._src.config import enable_compilation_cache as jax_cache_setting
from jax.experimental import serialize_executable

from spotjax.runtime.program_cache import ProgramCache

log = logging.getLogger(__name__)

Devices = tuple[jax.Device, ...]
Lower = Callable[[Devices], jax.stages.Lowered]
"""Lowers a function for the given devices."""
Key = tuple[Hashable, ...]
"""Names a function and all that its compiled form depends on, devices excepted (their number included)."""
BACKGROUND = "compile"
"""Name of the thread that compiles what nobody waits for."""


@dataclass(frozen=True)
class _Portable:
    """A compiled function in a form that other devices, and other processes, can load."""

    content: bytes
    in_tree: Any
    out_tree: Any
    device_ids: tuple[int, ...]

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, devices: Devices) -> _Portable:
        content, in_tree, out_tree = serialize_executable.serialize(compiled)
        return cls(content, in_tree, out_tree, tuple(device.id for device in devices))

    def load(self, devices: Devices) -> jax.stages.Compiled:
        """The function on ``devices``, which take the places of the original ones in order."""
        unpickler = _Retarget(self.content, self.device_ids, devices)
        executable, arguments, no_kwargs = unpickler.load()
        return jax.stages.Compiled(
            executable.load(), [], self.in_tree.unflatten(arguments), self.out_tree, no_kwargs=no_kwargs
        )


class _Retarget(serialize_executable._JaxPjrtUnpickler):
    """jax's own reader of serialized executables, with the devices exchanged.

    jax's ``deserialize_and_load`` takes ``execution_devices`` but keeps the original device assignment, so that the
    result refuses to run there (jax 0.10 to 0.12); the compile options given here carry the new one.
    """

    def __init__(self, content: bytes, old_ids: tuple[int, ...], new: Devices) -> None:
        super().__init__(io.BytesIO(content), new[0].client, new)  # type: ignore[no-untyped-call]
        self.devices_by_id = dict(zip(old_ids, new, strict=True))
        self._options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=len(new),
            device_assignment=np.array([[device.id for device in new]]),
            backend=new[0].client,
        )
        self._options.executable_build_options.use_spmd_partitioning = True
        self._options.executable_build_options.use_shardy_partitioner = True

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        if pid[0] == "exec":
            return self.backend.deserialize_executable(pid[1], self.execution_devices, self._options)
        return super().persistent_load(pid)  # type: ignore[no-untyped-call]


class Executables:
    """All compiled functions of one process.

    Args:
      cache: keeps them between processes; None keeps nothing.

    Attributes:
      compiled: how many functions were compiled while somebody waited for them; it must stand still during a
        preemption.
      compiled_in_background: how many were compiled while nobody did.
    """

    def __init__(self, cache: ProgramCache | None = None) -> None:
        self.compiled = 0
        self.compiled_in_background = 0
        self._cache = cache
        self._loaded: dict[tuple[Key, Devices], jax.stages.Compiled] = {}
        self._portable: dict[Key, _Portable] = {}
        self._locks: dict[Key, threading.Lock] = {}
        self._guard = threading.Lock()
        self._background = ThreadPoolExecutor(1, thread_name_prefix=BACKGROUND)
        self._requested: dict[tuple[Key, Devices], Future[None]] = {}

    def get(self, key: Key, devices: Devices, lower: Lower) -> jax.stages.Compiled:
        """The function on these devices, compiled now if it never was."""
        found = self._loaded.get((key, devices))
        return found if found is not None else self._make(key, devices, lower)

    def get_if_ready(self, key: Key, devices: Devices) -> jax.stages.Compiled | None:
        """The function on these devices if it takes neither compiling nor loading, else None."""
        return self._loaded.get((key, devices))

    def request(self, key: Key, devices: Devices, lower: Lower) -> None:
        """Makes the function ready in the background, one at a time; ``get_if_ready`` finds it afterwards."""
        with self._guard:
            if (key, devices) not in self._requested:
                work = self._background.submit(self._compile_quietly, key, devices, lower)
                self._requested[key, devices] = work

    def wait_for_background(self) -> None:
        """Returns when every requested function is compiled."""
        while pending := [future for future in list(self._requested.values()) if not future.done()]:
            for future in pending:
                future.result()

    def close(self) -> None:
        """Gives up background work that has not begun."""
        self._background.shutdown(wait=True, cancel_futures=True)

    def _make(self, key: Key, devices: Devices, lower: Lower) -> jax.stages.Compiled:
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            found = self._loaded.get((key, devices))
            if found is not None:
                return found
            made = self._from_portable(key, devices) or self._compile_once(key, devices, lower)
            with self._guard:
                self._loaded[key, devices] = made
            return made

    def _from_portable(self, key: Key, devices: Devices) -> jax.stages.Compiled | None:
        """The function from memory or disk, if it is there."""
        portable = self._portable.get(key)
        if portable is not None:
            try:
                return portable.load(devices)
            except (RuntimeError, KeyError, TypeError, AttributeError) as problem:
                log.warning("%s does not load on other devices and is compiled for them: %s", key[0], problem)
                return None
        content = self._cache.get(repr(key)) if self._cache is not None else None
        if self._cache is None or content is None:
            return None
        try:
            portable = pickle.loads(content)
            loaded: jax.stages.Compiled = portable.load(devices)
        except Exception as problem:  # whatever a damaged entry makes the reader raise
            log.warning("the cached program %s is unusable and will be compiled again: %s", key[0], problem)
            self._cache.drop(repr(key))
            return None
        self._portable[key] = portable
        return loaded

    def _compile_once(self, key: Key, devices: Devices, lower: Lower) -> jax.stages.Compiled:
        """Compiles, unless another process that shares the cache does: then waits and loads."""
        if self._cache is None:
            return self._compile(key, devices, lower)
        with self._cache.compiling(repr(key)):
            return self._from_portable(key, devices) or self._compile(key, devices, lower)

    def _compile(self, key: Key, devices: Devices, lower: Lower) -> jax.stages.Compiled:
        if threading.current_thread().name.startswith(BACKGROUND):
            self.compiled_in_background += 1
        else:
            self.compiled += 1
        with jax_cache_setting(False):  # what jax's cache returns cannot be serialized again
            compiled = lower(devices).compile()
        try:
            portable = _Portable.of(compiled, devices)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as problem:
            log.warning("%s cannot be moved between devices without compiling again: %s", key[0], problem)
            return compiled
        self._portable[key] = portable
        if self._cache is not None:
            self._cache.put(repr(key), pickle.dumps(portable))
        return compiled

    def _compile_quietly(self, key: Key, devices: Devices, lower: Lower) -> None:
        """A background compilation that fails costs speed, not service."""
        try:
            self.get(key, devices, lower)
        except Exception:
            log.exception("background compilation of %s failed; going on without it", key[0])
