"""A service in one file: all of it arrives, nothing that is damaged or evil does, and nothing is overwritten."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from checkpoint_cases import MANY_CHUNKS, random_model, save, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from restart_cases import MODEL, Left, damage, files_below, fill, leave_log, leave_save

from spotjax.checkpoint import bundle as packing
from spotjax.checkpoint.bundle import BUNDLE, Bundle, Member, described_in, open_bundle, pack
from spotjax.checkpoint.saves import newest
from spotjax.checkpoint.unpacking import unpack
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.log_inspection import inspect_log
from spotjax.errors import CheckpointError, CommitLogError
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint

REQUESTS = (
    Left("a", (5,), key=0), Left("b", (2, 9), key=1), Left("done", (4,), ended=True, key=3),
    Left("over", resumable=False, key=4),
)  # fmt: skip
LOG = "commit_log/commits.sqlite"


@pytest.fixture
def service(tmp_path: Path) -> str:
    """A log and two saves in ``old``; what it is called."""
    identity = leave_log(tmp_path / "old" / "log", REQUESTS)
    leave_save(tmp_path / "old" / "checkpoint", identity, {0: 2}, b"older")
    leave_save(tmp_path / "old" / "checkpoint", identity, {0: 4, 1: 2}, b"newer")
    return identity


def packed(tmp_path: Path, parameters: bool = False) -> Path:
    target = tmp_path / "service.tar"
    pack(target, tmp_path / "old" / "log", str(tmp_path / "old" / "checkpoint"), "tiny", parameters=parameters)
    return target


def test_log_and_newest_save_arrive_elsewhere(tmp_path: Path, service: str) -> None:
    source = packed(tmp_path)
    told = read_bundle(source)
    assert (told.service, told.model, told.model_name, told.epoch) == (service, MODEL, "tiny", 3)
    assert (told.requests, told.unfinished, told.sequences_with_kv, told.parameters) == (4, 2, 2, False)
    unpacked = unpack(source, tmp_path / "log", str(tmp_path / "checkpoint"))
    assert unpacked.left_out == () and unpacked.bundle == told
    before, after = inspect_log(tmp_path / "old" / "log"), inspect_log(tmp_path / "log")
    assert (after.requests, after.identity, after.epoch) == (before.requests, service, 3) and not after.damage
    found = newest(str(tmp_path / "checkpoint"), service)
    assert found is not None and found.sequences == {0: 4, 1: 2}
    assert [path.read_bytes() for path in Path(found.path).rglob("content")] == [b"newer"]


def test_a_server_goes_on_with_what_arrived(tmp_path: Path, service: str) -> None:
    unpack(packed(tmp_path), tmp_path / "log", "")
    log = DurableLog.open(tmp_path / "log", "step", MODEL)
    assert log.identity == service
    assert [recorded.states for recorded in log.replay()] == [tuple(left.states()) for left in REQUESTS]
    asyncio.run(log.close())


def test_parameters_arrive_complete_and_are_not_written_twice(tmp_path: Path) -> None:
    weights = save(random_model(MANY_CHUNKS).checkpoint, tmp_path / "old" / "checkpoint")
    print_of = fingerprint(weights, np.dtype(np.float32))
    leave_log(tmp_path / "old" / "log", REQUESTS, print_of)
    source = packed(tmp_path, parameters=True)
    assert read_bundle(source).parameters
    assert unpack(source, tmp_path / "log", str(tmp_path / "checkpoint")).left_out == ()
    arrived = OrbaxCheckpoint(tmp_path / "checkpoint")
    verify(arrived)
    assert fingerprint(arrived, np.dtype(np.float32)) == print_of
    (note,) = unpack(source, tmp_path / "log-2", str(tmp_path / "checkpoint")).left_out
    assert "the same already" in note


def test_parameters_of_another_model_are_neither_packed_nor_replaced(tmp_path: Path) -> None:
    weights = save(random_model(MANY_CHUNKS).checkpoint, tmp_path / "old" / "checkpoint")
    leave_log(tmp_path / "old" / "log", REQUESTS)
    with pytest.raises(CheckpointError, match="of another model than the commit log's"):
        packed(tmp_path, parameters=True)
    leave_log(tmp_path / "other" / "log", REQUESTS, fingerprint(weights, np.dtype(np.float32)))
    source = tmp_path / "other.tar"
    pack(source, tmp_path / "other" / "log", str(tmp_path / "old" / "checkpoint"), "", parameters=True)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has other parameters"):
        unpack(source, tmp_path / "log", str(tmp_path / "checkpoint"))
    assert files_below(tmp_path / "checkpoint") == {"manifest.json": b"{}"} and not (tmp_path / "log").exists()
    with pytest.raises(CheckpointError, match="no parameters to put into a bundle"):
        pack(tmp_path / "x.tar", tmp_path / "old" / "log", str(tmp_path / "nothing"), "", parameters=True)


async def test_a_log_in_use_is_copied_at_one_moment(tmp_path: Path) -> None:
    log = DurableLog.open(tmp_path / "old" / "log", "step", MODEL)
    await fill(log, REQUESTS)
    source = await asyncio.to_thread(packed, tmp_path)
    await fill(log, [Left("later", key=9)])
    unpack(source, tmp_path / "log", "")
    assert len(inspect_log(tmp_path / "old" / "log").requests) == 5
    assert len(inspect_log(tmp_path / "log").requests) == 4
    with pytest.raises(CommitLogError, match="in use"):
        unpack(source, tmp_path / "old" / "log", "")
    await log.close()


def test_everything_is_private_and_nothing_else_is_left(tmp_path: Path, service: str) -> None:
    old = os.umask(0)
    try:
        source = packed(tmp_path)
        unpack(source, tmp_path / "new" / "log", str(tmp_path / "new" / "checkpoint"))
    finally:
        os.umask(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "service.tar"]
    assert source.stat().st_mode & 0o777 == 0o600
    kept = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o77 == 0 for path in kept)
    assert {path.name for path in kept} >= {"commits.sqlite", "saved.json", "content"}
    assert not [path for path in (tmp_path / "new").rglob("*") if "import" in path.name]


def test_an_older_save_that_is_there_does_not_hide_the_one_that_came(tmp_path: Path, service: str) -> None:
    for _ in range(3):
        leave_save(tmp_path / "checkpoint", service, {0: 1})
    unpack(packed(tmp_path), tmp_path / "log", str(tmp_path / "checkpoint"))
    found = newest(str(tmp_path / "checkpoint"), service)
    assert found is not None and Path(found.path).name == "000004" and found.sequences == {0: 4, 1: 2}


def test_without_a_checkpoint_it_is_told_what_is_left_out(tmp_path: Path, service: str) -> None:
    (note,) = unpack(packed(tmp_path), tmp_path / "log", "").left_out
    assert note.startswith("KV of 2 sequences")


@pytest.mark.parametrize("length", [0.0, 0.3, 0.7, 0.95])
def test_a_bundle_that_was_cut_off_is_refused(tmp_path: Path, service: str, length: float) -> None:
    source = packed(tmp_path)
    content = source.read_bytes().rstrip(b"\0")
    source.write_bytes(content[: int(length * len(content))])
    refused(source, tmp_path)


@given(st.data())
@settings(max_examples=25)
def test_damage_anywhere_is_noticed_or_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("bundle")
    identity = leave_log(tmp_path / "old" / "log", REQUESTS)
    leave_save(tmp_path / "old" / "checkpoint", identity, {0: 4})
    source = packed(tmp_path)
    content = bytearray(source.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    source.write_bytes(content)
    try:
        unpack(source, tmp_path / "log", str(tmp_path / "checkpoint"))
    except (CheckpointError, CommitLogError):
        assert not (tmp_path / "log" / "commits.sqlite").exists()
        assert files_below(tmp_path / "checkpoint") == {}
    else:
        assert inspect_log(tmp_path / "log").requests == inspect_log(tmp_path / "old" / "log").requests
        (saved,) = (path for path in (tmp_path / "checkpoint").rglob("content"))
        assert saved.read_bytes() == b"KV"


def refused(source: Path, tmp_path: Path) -> str:
    """Why a bundle is not unpacked, with nothing put anywhere."""
    with pytest.raises(CheckpointError) as problem:
        unpack(source, tmp_path / "log", str(tmp_path / "checkpoint"))
    assert not (tmp_path / "log" / "commits.sqlite").exists()
    assert files_below(tmp_path / "checkpoint") == {}
    return str(problem.value)


def forged(tmp_path: Path, change: Callable[[tarfile.TarInfo], bytes], **told: object) -> Path:
    """A bundle with one entry more, which ``change`` makes of a plain one, and that its ``bundle.json`` names."""
    source, forgery = packed(tmp_path), tmp_path / "forged.tar"
    with tarfile.open(source) as tar, tarfile.open(forgery, "w") as out:
        for entry in tar:
            content = tar.extractfile(entry)
            if entry.name != BUNDLE:
                out.addfile(entry, content)
        extra = tarfile.TarInfo("checkpoint/tokenizer/extra")
        content = change(extra)
        extra.size = len(content)
        out.addfile(extra, io.BytesIO(content))
        told = {"members": read_bundle(source).members | {extra.name: Member(len(content), sha256(content))}} | told
        last = msgspec.json.encode(msgspec.structs.replace(read_bundle(source), **told))
        entry = tarfile.TarInfo(BUNDLE)
        entry.size = len(last)
        out.addfile(entry, io.BytesIO(last))
    return forgery


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def named(name: str) -> Callable[[tarfile.TarInfo], bytes]:
    def change(entry: tarfile.TarInfo) -> bytes:
        entry.name = name
        return b"evil"

    return change


def of_type(kind: bytes) -> Callable[[tarfile.TarInfo], bytes]:
    def change(entry: tarfile.TarInfo) -> bytes:
        entry.type, entry.linkname = kind, "/etc/passwd"
        return b""

    return change


EVIL = {
    "absolute": named("/tmp/evil"),
    "upwards": named("checkpoint/tokenizer/../../../evil"),
    "upwards at once": named("../evil"),
    "doubled slash": named("checkpoint/tokenizer//evil"),
    "elsewhere": named("evil"),
    "beside the log": named("commit_log/commits.sqlite-wal"),
    "another service's save": named("checkpoint/saves/other/000001/saved.json"),
    "a save without a number": named("checkpoint/saves/x/saved.json"),
    "symbolic link": of_type(tarfile.SYMTYPE),
    "hard link": of_type(tarfile.LNKTYPE),
    "device": of_type(tarfile.CHRTYPE),
    "pipe": of_type(tarfile.FIFOTYPE),
    "directory": of_type(tarfile.DIRTYPE),
    "the log twice": named(LOG),
}


@pytest.mark.parametrize("kind", EVIL)
def test_tricks_of_tar_files_are_refused(tmp_path: Path, service: str, kind: str) -> None:
    forgery = forged(tmp_path, EVIL[kind])
    before = set(tmp_path.rglob("*"))
    refused(forgery, tmp_path)
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"log", "lock", "checkpoint"}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"format": 2}, "format 2"),
        ({"service": "../.."}, "not of a bundle"),
        ({"members": {}}, "does not have the files"),
        ({"parameters": True}, "lacks"),
        ({"unfinished": 0}, "not what its bundle.json says"),
        ({"model": "other"}, "not what its bundle.json says"),
    ],
)
def test_what_a_bundle_says_of_itself_must_be_true(
    tmp_path: Path, service: str, told: dict[str, object], why: str
) -> None:
    forgery = forged(tmp_path, lambda entry: b"harmless", **told)
    assert why in refused(forgery, tmp_path)


def test_other_files_are_no_bundles(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar file")
    with tarfile.open(tmp_path / "other.tar", "w"):
        pass
    assert "no bundle" in refused(tmp_path / "text", tmp_path)
    assert "no bundle" in refused(tmp_path / "other.tar", tmp_path)
    assert "cannot be read" in refused(tmp_path / "missing", tmp_path)


def test_a_log_with_unfinished_requests_is_not_replaced(tmp_path: Path, service: str) -> None:
    leave_log(tmp_path / "log", [Left("mine")])
    before = inspect_log(tmp_path / "log")
    with pytest.raises(CommitLogError, match="has 1 unfinished requests"):
        unpack(packed(tmp_path), tmp_path / "log", str(tmp_path / "checkpoint"))
    assert inspect_log(tmp_path / "log").requests == before.requests


def test_a_damaged_log_is_not_replaced(tmp_path: Path, service: str) -> None:
    leave_log(tmp_path / "log", [Left("mine", ended=True)])
    damage(tmp_path / "log", "mine")
    content = (tmp_path / "log" / "commits.sqlite").read_bytes()
    with pytest.raises(CommitLogError, match="is damaged"):
        unpack(packed(tmp_path), tmp_path / "log", "")
    assert (tmp_path / "log" / "commits.sqlite").read_bytes() == content


@pytest.mark.parametrize("mine", [Left("mine", ended=True), Left("mine", resumable=False)])
async def test_a_log_of_which_nothing_goes_on_is_replaced_with_nothing_of_it_left(tmp_path: Path, mine: Left) -> None:
    await asyncio.to_thread(leave_log, tmp_path / "old" / "log", REQUESTS)
    log = DurableLog.open(tmp_path / "log", "step", MODEL)
    await fill(log, [mine])
    await log.close()
    for suffix in ("-wal", "-shm"):  # as a killed process leaves them
        (tmp_path / "log" / f"commits.sqlite{suffix}").touch()
    await asyncio.to_thread(lambda: unpack(packed(tmp_path), tmp_path / "log", ""))
    assert [request.request_id for request in inspect_log(tmp_path / "log").requests] == ["a", "b", "done", "over"]
    assert b"mine" not in b"".join(files_below(tmp_path / "log").values())


KILLED = """
import os, signal, sys
from pathlib import Path
from spotjax.checkpoint import unpacking
ends = signal.SIGKILL if sys.argv[4] == "killed" else signal.SIGSTOP
unpacking._require_told = lambda *_: (print("unpacked", flush=True), os.kill(os.getpid(), ends))
unpacking.unpack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_import_removes_what_those_that_are_dead_left_in_the_checkpoint(
    tmp_path: Path, service: str, how: str
) -> None:
    source, checkpoint = packed(tmp_path), tmp_path / "checkpoint"
    command = [sys.executable, "-c", KILLED, source, tmp_path / "other-log", checkpoint, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "unpacked\n"
        if how == "killed":
            other.wait()
        (left,) = checkpoint.glob(".import-*")
        assert list(left.rglob("content"))
        unpack(source, tmp_path / "log", str(checkpoint))
        assert left.exists() is (how == "stopped")
        other.kill()
    assert newest(str(checkpoint), service) is not None


def test_an_import_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path, service: str) -> None:
    (tmp_path / "log" / "import-killed").mkdir(parents=True)
    (tmp_path / "log" / "import-killed" / "prompts").touch()
    unpack(packed(tmp_path), tmp_path / "log", "")
    assert not (tmp_path / "log" / "import-killed").exists()


def test_what_cannot_be_exported_is_said_and_leaves_no_file(
    tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = packed(tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        packed(tmp_path)
    source.unlink()
    with pytest.raises(CheckpointError, match="in a bucket"):
        pack(source, tmp_path / "old" / "log", "gs://bucket/model", "", parameters=False)
    with pytest.raises(CommitLogError, match="there is no commit log"):
        pack(source, tmp_path / "nothing", "", "", parameters=False)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.tarfile.TarFile, "addfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        packed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_damaged_log_is_not_exported(tmp_path: Path, service: str) -> None:
    damage(tmp_path / "old" / "log", "done")
    with pytest.raises(CommitLogError, match="is damaged"):
        packed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_units_that_were_not_finished_are_left_out(tmp_path: Path, service: str) -> None:
    found = newest(str(tmp_path / "old" / "checkpoint"), service)
    assert found is not None
    undone = Path(found.path) / "worker-0" / "000002.orbax-checkpoint-tmp"
    undone.mkdir()
    (undone / "content").write_bytes(b"half")
    assert not [name for name in members(packed(tmp_path)) if "orbax-checkpoint-tmp" in name]


def read_bundle(source: Path) -> Bundle:
    with open_bundle(source) as tar:
        return described_in(tar, source)


def members(source: Path) -> dict[str, Member]:
    return read_bundle(source).members
