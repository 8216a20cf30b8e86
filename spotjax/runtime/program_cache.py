"""Compiled programs on disk, so that a second start compiles nothing.

jax's own persistent cache cannot serve here: what comes out of it on the CPU backend cannot be put on other devices any
more (jax 0.10 to 0.12: symbols are missing after the second serialization). Entries hold native code, as jax's do: the
directory must be as trusted as the program itself, and is created for its owner alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jax

log = logging.getLogger(__name__)

COMPILED_PACKAGES = ("spotjax.models", "spotjax.meshes")
COMPILED_MODULES = (
    "runtime/attention/gpu.py", "runtime/attention/tpu.py", "runtime/attention/xla.py", "runtime/compiled.py",
    "runtime/controls.py", "runtime/executables.py", "runtime/functions.py", "runtime/kv.py",
    "runtime/native/attention.py", "runtime/native/products.py", "runtime/sampling.py", "engine/request.py",
)  # fmt: skip
"""Whose source decides what is compiled."""
LOCKS = 256
"""Programs that can be compiled at once by the processes of a machine, more or less."""


def cache_directory(setting: str) -> Path | None:
    """Where compiled programs are kept between runs: as told, else in the user's cache directory; None for nowhere."""
    if setting == "off":
        return None
    return Path(setting) if setting else cache_home(os.environ) / "programs"


def cache_home(environment: Mapping[str, str]) -> Path:
    """Where all is kept that can be made or fetched again."""
    told = environment.get("SPOTJAX_CACHE")
    return Path(told or Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spotjax"))


class ProgramCache:
    """Programs by key in one directory.

    Args:
      directory: made if missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._common = "\n".join((_machine(), _source()))

    def get(self, key: str) -> bytes | None:
        """A program, or None when it is not there."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as problem:
            log.warning("cannot read the program cache: %s", problem)
            return None

    def put(self, key: str, content: bytes) -> None:
        """Keeps a program. A full or read-only disk costs the next start time, nothing else."""
        try:
            with tempfile.TemporaryDirectory(dir=self._directory) as unfinished:
                written = Path(unfinished, "program")
                written.write_bytes(content)
                os.replace(written, self._path(key))
        except OSError as problem:
            log.warning("cannot write the program cache: %s", problem)

    @contextmanager
    def compiling(self, key: str) -> Iterator[None]:
        """Held while a program is compiled, so that the processes of a machine share the work instead of repeating it.

        Look with ``get`` again when it is held: another process may just have put the program in.
        """
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2]) % LOCKS
        with locked(self._directory / f"{number}.lock"):
            yield

    def drop(self, key: str) -> None:
        """Removes a program that turned out to be unusable."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / hashlib.sha256(f"{self._common}\n{key}".encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process, or thread, at a time. Where the file cannot be made it keeps nobody out."""
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:  # a directory that cannot be written: everybody compiles for themselves
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def cpu_features() -> str:
    """What instructions the CPU has, as Linux lists them; empty elsewhere."""
    if not Path("/proc/cpuinfo").exists():
        return ""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _machine() -> str:
    """Everything outside our source that compiled code depends on."""
    device = jax.devices()[0]
    features = cpu_features() if device.platform == "cpu" else ""
    if jax.process_count() > 1:
        features += f"\n{jax.process_count()} processes"
    parts = (jax.__version__, version("jaxlib"), device.platform, device.device_kind, platform.machine(), features)
    return "\n".join((*parts, device.client.platform_version, os.environ.get("XLA_FLAGS", "")))


def _source() -> str:
    """Hash of the source of all that is compiled."""
    digest = hashlib.sha256()
    for package in COMPILED_PACKAGES:
        for file in sorted((entry for entry in files(package).iterdir() if entry.name.endswith(".py")), key=str):
            digest.update(file.read_bytes())
    for module in COMPILED_MODULES:
        digest.update(files("spotjax").joinpath(module).read_bytes())
    return digest.hexdigest()
