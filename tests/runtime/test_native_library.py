"""Compilers that are missing, fail, or are asked twice: what a server then does. Needs no compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from spotjax.errors import ConfigError
from spotjax.runtime.native.choice import KernelSetting, choose_kernels
from spotjax.runtime.native.library import Compiler, NativeUnavailable, find_compiler, library_name, load_library

TEXT = {"a.cc": b"source"}
SHARED = np.linalg._umath_linalg.__file__  # type: ignore[attr-defined]
"""A shared library, any: what is tested here is how one is made and loaded."""
GIVES_ONE = f'echo compiled >> "$(dirname "$0")/log"\nsleep 0.2\ncp "{SHARED}" "$OUT"'


def compiler(directory: Path, work: str) -> dict[str, str]:
    """An environment whose compiler is a script; ``$OUT`` is the file that it is to make."""
    script = directory / "compile"
    find = 'while [ "$1" != -o ]; do shift; done\nOUT=$2'
    script.write_text(f'#!/bin/sh\nif [ "$2$1" = --version ]; then echo one; exit; fi\n{find}\n{work}\n')
    script.chmod(0o700)
    return {"CXX": str(script), "SPOTJAX_CACHE": str(directory / "cache"), "PATH": os.environ["PATH"]}


def made(directory: Path) -> list[Path]:
    """The libraries that are kept."""
    return list((directory / "cache" / "native").glob("*.so"))


def test_threads_and_processes_that_start_together_share_the_work_of_compiling(tmp_path: Path) -> None:
    environment = compiler(tmp_path, GIVES_ONE)
    start = "from spotjax.runtime.native.library import load_library; print(load_library().name)"
    others = [
        subprocess.Popen(
            [sys.executable, "-c", start], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    with ThreadPoolExecutor(4) as threads:
        names = {library.name for library in threads.map(load_library, [environment] * 4)}
    names |= {process.communicate(timeout=120)[0].strip() for process in others}
    assert [path.stem for path in made(tmp_path)] == list(names)
    assert (tmp_path / "log").read_text() == "compiled\n"
    assert (tmp_path / "cache" / "native").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        ("echo 'x.cc:1: error: no such thing' >&2; exit 1", "no such thing"),
        ("kill -9 $$", "failed"),
        ('echo cut off > "$OUT"', "cut off|invalid|too short|file"),
        ("true", "No such file"),
    ],
    ids=["error", "killed", "damaged", "nothing"],
)
def test_a_compiler_that_fails_leaves_nothing_and_the_reason(tmp_path: Path, work: str, reason: str) -> None:
    with pytest.raises(NativeUnavailable, match=reason):
        load_library(compiler(tmp_path, work))
    assert not made(tmp_path)
    load_library(compiler(tmp_path, GIVES_ONE))
    assert len(made(tmp_path)) == 1


def test_machines_without_a_compiler_say_so(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        find_compiler({"PATH": str(tmp_path)})
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler \(/is/not --there\)"):
        find_compiler({"PATH": os.environ["PATH"], "CXX": "/is/not --there"})


def test_a_cache_directory_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(NativeUnavailable, match="cache"):
        load_library(compiler(tmp_path, GIVES_ONE))


def test_a_library_is_named_after_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Compiler(("c++",), "12.2", ("-march=native",))
    names = [
        library_name(one, TEXT),
        library_name(one, {"a.cc": b"other source"}),
        library_name(replace(one, about="13.1"), TEXT),
        library_name(replace(one, command=("ccache", "c++")), TEXT),
        library_name(replace(one, tuning=()), TEXT),
    ]
    for function in ("cpu_features", "version"):
        with monkeypatch.context() as patch:
            patch.setattr(f"spotjax.runtime.native.library.{function}", lambda *_: "another")
            names.append(library_name(one, TEXT))
    assert len(set(names)) == len(names)
    assert library_name(one, TEXT) == names[0]


def without_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("CXX", "/is/not/there")
    monkeypatch.setenv("SPOTJAX_CACHE", str(directory))


def test_auto_goes_on_without_a_compiler_and_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiler(monkeypatch, tmp_path)
    with caplog.at_level(logging.INFO):
        assert choose_kernels("auto", jax.devices()[0]) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler (/is/not/there)" in caplog.text


def test_native_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"cpu_kernels \(native\).*no C\+\+ compiler"):
        choose_kernels("native", jax.devices()[0])


@pytest.mark.parametrize("setting", ["xla", "auto"])
def test_nothing_is_compiled_where_nobody_needs_it(setting: KernelSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotjax.runtime.native.choice.native_kernels", lambda: pytest.fail("compiled"))
    gpu: Any = SimpleNamespace(platform="gpu")
    assert choose_kernels(setting, gpu) is None
    assert choose_kernels("xla", jax.devices()[0]) is None
    with pytest.raises(ConfigError, match=r"cpu_kernels \(native\) needs a CPU"):
        choose_kernels("native", gpu)
