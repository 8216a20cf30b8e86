"""The C++ sources of this package as a shared library: compiled once on a machine, then found in the cache directory.

Knows compilers, files and processes; what the library computes is the business of who loads it. Entries hold native
code, so the directory is created for its owner alone, as that of compiled programs is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp

from spotjax.runtime.program_cache import cache_home, cpu_features, locked

SOURCES = ("attention.cc", "products.cc")
HEADERS = ("few_rows.h", "many_rows.h", "product.h", "vectors.h", "work.h")
SERVED = (jnp.float32, jnp.bfloat16)
"""Types of activations that the library computes with."""
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
COMPILE_SECONDS = 300.0
"""A compilation that takes longer is given up; it takes about 8 s."""


class NativeUnavailable(Exception):
    """There is no library, and why."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
      command: with which it is called.
      about: its version.
      tuning: options with which it compiles for the machine it runs on.
    """

    command: tuple[str, ...]
    about: str
    tuning: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
      name: differs where the library does.
    """

    name: str
    functions: ctypes.CDLL


_loaded: dict[Path, Library] = {}
_loading = threading.Lock()


def load_library(environment: Mapping[str, str] = os.environ) -> Library:
    """The library for this machine, compiled now if it never was. May take seconds, blocks.

    Raises:
      NativeUnavailable: it cannot be compiled or loaded.
    """
    try:
        compiler = find_compiler(environment)
        name = library_name(compiler, sources())
        directory = cache_home(environment) / "native"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _loading:
            path = directory / f"{name}.so"
            if path not in _loaded:
                with locked(directory / "lock"):
                    if not path.exists():
                        _compile(compiler, path, environment)
                _loaded[path] = Library(name, _open(path))
            return _loaded[path]
    except OSError as problem:
        raise NativeUnavailable(str(problem)) from problem


def find_compiler(environment: Mapping[str, str]) -> Compiler:
    """``$CXX``, else the first of the usual ones.

    Raises:
      NativeUnavailable: there is none.
    """
    told = tuple(shlex.split(environment.get("CXX", "")))
    for command in [told] if told else [(name,) for name in COMPILERS]:
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            continue
        about = _run([*command, "--version"], environment)
        # clang knows -march=native on x86 only; -mcpu=native means the same elsewhere, to both
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return Compiler(command, about, ("-march=native",) if x86 else ("-mcpu=native",))
    raise NativeUnavailable(f"there is no C++ compiler ({' '.join(told) or ', '.join(COMPILERS)})")


def sources() -> dict[str, bytes]:
    """What is compiled, by the names of files."""
    return {name: files(__package__).joinpath(name).read_bytes() for name in (*SOURCES, *HEADERS)}


def library_name(compiler: Compiler, texts: Mapping[str, bytes]) -> str:
    """Names all that a library depends on."""
    parts = (*compiler.command, compiler.about, *compiler.tuning, *OPTIONS, platform.machine(), cpu_features())
    digest = hashlib.sha256("\n".join((*parts, jax.__version__, version("jaxlib"))).encode())
    for name, text in sorted(texts.items()):
        digest.update(f"\n{name} {len(text)}\n".encode() + text)
    return f"kernels-{digest.hexdigest()[:24]}"


def _compile(compiler: Compiler, path: Path, environment: Mapping[str, str]) -> None:
    """Makes the library, or nothing. Raises NativeUnavailable."""
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        for name, text in sources().items():
            Path(unfinished, name).write_bytes(text)
        made = Path(unfinished, path.name)
        inputs = [str(Path(unfinished, name)) for name in SOURCES]
        headers = ("-isystem", jax.ffi.include_dir())
        _run([*compiler.command, *OPTIONS, *compiler.tuning, *headers, "-o", str(made), *inputs], environment)
        os.replace(made, path)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command printed. Raises NativeUnavailable."""
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise NativeUnavailable(f"{command[0]} cannot be run: {problem}") from problem
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NativeUnavailable(f"{command[0]} failed ({done.returncode}): {reason}")
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library; one that cannot be loaded is removed, so that the next start makes it anew."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise
