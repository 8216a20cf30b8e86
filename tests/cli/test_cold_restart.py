"""``spotjax cold-restart``: what it shows, refuses, moves, and starts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from restart_cases import Left, damage, files_below, leave_log, leave_save

from spotjax import cli, serve
from spotjax.config import ServeConfig
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.log_inspection import inspect_log
from spotjax.models.catalog import open_model
from spotjax.models.fingerprint import fingerprint

TINY = fingerprint(open_model("tiny").checkpoint, np.dtype(np.float32))
REQUESTS = (Left("one-request", (5,)), Left("two-choices", (2, 3), key=1), Left("over", ended=True, key=3))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["cold-restart", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    leave_log(tmp_path / "log", REQUESTS, TINY)
    return tmp_path / "log"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, Any]]:
    """What would have been served; nothing is."""
    calls: list[tuple[ServeConfig, Any]] = []

    def run(config: ServeConfig, beside: object = None) -> int:
        calls.append((config, beside))
        return 0

    monkeypatch.setattr(serve, "run", run)
    return calls


def test_a_dry_run_shows_requests_kv_and_mesh_but_no_text(run: Run, log: Path, tmp_path: Path) -> None:
    leave_save(tmp_path / "checkpoint", inspect_log(log).identity, {0: 13, 2: 10})
    before = files_below(log)["commits.sqlite"]
    code, out, _ = run("--commit-log", log, "--checkpoint", tmp_path / "checkpoint", "--workers", "3", "--dry-run")
    assert code == 0
    assert "2 unfinished requests go on; 1 finished ones can still be read" in out
    assert "saved KV: at most 23 positions, of 2 requests; 17 positions are computed again" in " ".join(out.split())
    assert "one-request" in out and "two-choices" in out and "over" not in out
    assert "mesh 1x2x2" in out and "instance-1" in out and "not needed: instance-2" in out
    assert "xxx" not in out  # their output
    assert files_below(log)["commits.sqlite"] == before


def test_the_same_as_json(run: Run, log: Path, tmp_path: Path) -> None:
    code, out, _ = run("--commit-log", log, "--instances", "4", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert [request["request_id"] for request in found["unfinished"]] == ["one-request", "two-choices"]
    assert found["finished"] == 1 and found["mesh"]["placement"]["shape"] == "2x2x2"
    assert found["unfinished"][1]["tokens"] == [2, 3]
    assert set(found["unfinished"][0]) == {
        "request_id", "prompt_tokens", "tokens", "resumable", "kv_positions", "recomputed_positions",
    }  # fmt: skip


def test_an_embedded_server_reads_no_saved_kv(run: Run, log: Path, tmp_path: Path) -> None:
    leave_save(tmp_path / "checkpoint", inspect_log(log).identity, {0: 13})
    code, out, _ = run("--commit-log", log, "--checkpoint", tmp_path / "checkpoint", "--instances", "2", "--dry-run")
    assert code == 0 and "saved KV: none; 40 positions are computed again" in out


async def test_a_dry_run_works_while_a_server_uses_the_log(run: Run, tmp_path: Path) -> None:
    log = await asyncio.to_thread(DurableLog.open, tmp_path / "log", "step", TINY)
    log.begin_epoch(2)
    where = ("--commit-log", tmp_path / "log", "--instances", "2")
    code, out, _ = await asyncio.to_thread(run, *where, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["user"].isdecimal()
    code, _, problem = await asyncio.to_thread(run, *where)
    assert code == 1 and "its service still runs" in problem
    code, out, _ = await asyncio.to_thread(run, *where, "--export", tmp_path / "x.tar")
    assert code == 0 and "warning: process" in out and "stop it before the bundle is imported" in out
    await log.close()


def test_a_damaged_log_is_shown_with_what_salvage_would_keep(run: Run, log: Path, served: list[Any]) -> None:
    damage(log, "one-request")
    where = ("--commit-log", log, "--instances", "2")
    code, out, problem = run(*where, "--dry-run")
    assert code == 1 and "damaged:" in out and "two-choices" in out
    assert "--salvage goes on with the 2 requests that are left" in problem
    code, _, problem = run(*where)
    assert code == 1 and "--salvage" in problem and not served
    code, out, _ = run(*where, "--dry-run", "--salvage")
    assert code == 0 and inspect_log(log).damage
    code, out, _ = run(*where, "--salvage")
    assert code == 0 and "salvaged: requests: row 1" in out and len(served) == 1
    assert [request.request_id for request in inspect_log(log).going_on] == ["two-choices"]
    assert list(log.glob("damaged-*.sqlite"))


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("--commit-log", "{tmp}/nothing"), 1, "there is no commit log in"),
        (("--commit-log", "{tmp}/other", "--dry-run"), 1, "is of a model with fingerprint"),
        (("--commit-log", "{tmp}/log", "--model", "{tmp}/no-model", "--dry-run"), 1, "no model"),
        (("--commit-log", "{tmp}/log", "--checkpoint", "{tmp}/half", "--dry-run"), 1, "has no manifest.json"),
        (("--commit-log", "{tmp}/log", "--instance-memory-bytes", "1000", "--dry-run"), 1, "devices"),
        (("--commit-log", "{tmp}/log", "--assume", "3xunknown", "--dry-run"), 2, "no instance type"),
        (("--join", "127.0.0.1:5"), 2, "starts a worker"),
        (("--durability", "none"), 2, "keeps no commit log"),
        (("--export", "x.tar", "--dry-run"), 2, "writes a bundle and stops"),
        (("--export", "x.tar", "--salvage"), 2, "writes a bundle and stops"),
        (("--with-parameters",), 2, "no meaning without --export"),
        (("--json",), 2, "--json is for"),
        (("--workers", "2", "--instances", "2"), 2, "has no meaning"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(
    run: Run, log: Path, tmp_path: Path, served: list[Any], arguments: tuple[str, ...], code: int, why: str
) -> None:
    leave_log(tmp_path / "other", REQUESTS, "another model")
    (tmp_path / "half" / "parameters").mkdir(parents=True)
    found, _, problem = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert found == code and why in problem
    assert not served


def test_it_serves_with_the_same_settings_and_follows_what_was_unfinished(
    run: Run, log: Path, tmp_path: Path, served: list[Any]
) -> None:
    code, out, _ = run("--commit-log", log, "--checkpoint", tmp_path / "saves", "--workers", "2", "--max-batch", "4")
    ((config, beside),) = served
    assert code == 0 and "2 unfinished requests" in out
    assert config == ServeConfig(
        commit_log=str(log), checkpoint=str(tmp_path / "saves"), workers=2, max_batch=4, model="tiny"
    )
    assert isinstance(beside, partial)
    assert [request.request_id for request in beside.keywords["unfinished"]] == ["one-request", "two-choices"]


def test_the_model_is_the_checkpoints_unless_one_is_named(
    run: Run, log: Path, tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint" / "parameters").mkdir(parents=True)
    run("--commit-log", log, "--checkpoint", "checkpoint", "--workers", "1")
    run("--commit-log", log, "--checkpoint", "checkpoint", "--workers", "1", "--model", "tiny")
    run("--commit-log", log, "--checkpoint", "checkpoint", "--instances", "1")
    (tmp_path / "settings.toml").write_text('model = "other"\ncheckpoint = "checkpoint"\nworkers = 1\n')
    run("--commit-log", log, "--config", "settings.toml")
    monkeypatch.setenv("SPOTJAX_MODEL", "named")
    run("--commit-log", log, "--checkpoint", "checkpoint", "--workers", "1")
    there = str(tmp_path / "checkpoint")
    assert [(config.model, config.checkpoint) for config, _ in served] == [
        (there, there), ("tiny", there), (there, ""), ("other", there), ("named", there),
    ]  # fmt: skip


def test_a_service_moves_in_a_bundle(run: Run, log: Path, tmp_path: Path, served: list[Any]) -> None:
    identity = inspect_log(log).identity
    leave_save(tmp_path / "checkpoint", identity, {0: 13})
    bundle = tmp_path / "service.tar"
    code, out, _ = run("--commit-log", log, "--checkpoint", tmp_path / "checkpoint", "--export", bundle)
    assert code == 0 and f"service {identity} of tiny, 3 requests (2 unfinished), KV of 1 sequences" in out
    assert "warning" not in out
    there = ("--commit-log", tmp_path / "new" / "log", "--checkpoint", tmp_path / "new" / "checkpoint")
    code, out, _ = run("--import", bundle, *there, "--workers", "2", "--dry-run")
    assert code == 0 and "imported service" in out and "2 unfinished requests go on" in out and not served
    assert str(tmp_path / "new" / "checkpoint" / "saves" / identity) in out.replace("\n", "")
    code, _, problem = run("--import", bundle, *there, "--workers", "2")
    assert code == 1 and "has 2 unfinished requests and is not replaced" in problem and not served
    code, out, _ = run("--import", bundle, "--commit-log", tmp_path / "newer", "--instances", "2")
    assert code == 0 and "left out: KV of 1 sequences" in out and len(served) == 1
    assert inspect_log(tmp_path / "newer").requests == inspect_log(log).requests


def test_json_of_an_export_is_its_bundle(run: Run, log: Path, tmp_path: Path) -> None:
    code, out, _ = run("--commit-log", log, "--export", tmp_path / "x.tar", "--json")
    told = json.loads(out)
    assert code == 0 and told["in_use_by"] == "" and list(told["members"]) == ["commit_log/commits.sqlite"]


def test_an_export_names_the_model_only_if_it_is_the_logs(run: Run, tmp_path: Path) -> None:
    leave_log(tmp_path / "log", REQUESTS, "another model")
    code, out, _ = run("--commit-log", tmp_path / "log", "--export", tmp_path / "x.tar", "--json")
    assert code == 0 and json.loads(out)["model_name"] == "" and json.loads(out)["model"] == "another model"
    code, _, problem = run("--commit-log", tmp_path / "log", "--export", tmp_path / "y.tar", "--model", "tiny")
    assert code == 1 and "is of a model with fingerprint" in problem and not (tmp_path / "y.tar").exists()


def test_the_module_is_the_command_and_loads_no_jax(log: Path) -> None:
    program = (
        "import runpy, sys\n"
        "try: runpy.run_module('spotjax.tools.cold_restart', run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 10 * ('jax' in sys.modules))\n"
    )
    command = [sys.executable, "-c", program, "--commit-log", str(log), "--workers", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 unfinished requests go on" in done.stdout
