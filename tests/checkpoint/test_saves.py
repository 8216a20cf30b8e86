"""Which save of a checkpoint counts: the newest that is complete, wherever the directory is by now."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from kv_cases import FORM, frame, pages_of
from kv_cases import save as save_kv

from spotjax.checkpoint import saves
from spotjax.checkpoint.contents import StoredSave, contents_of
from spotjax.checkpoint.saves import GENERATION, SAVED, Save, complete, discard, newest, next_path, remove_older
from spotjax.errors import CheckpointError

SERVICE = "one"


def save(checkpoint: Path, positions: int = 10, service: str = SERVICE) -> Save:
    """A complete save of one sequence."""
    return complete(next_path(str(checkpoint), service), service, 3, 2, {5: positions}, {5: "digest"})


def test_the_newest_complete_save_counts(tmp_path: Path) -> None:
    assert newest(str(tmp_path), SERVICE) is None
    for positions in (1, 2, 3):
        made = save(tmp_path, positions)
        assert newest(str(tmp_path), SERVICE) == made and made.sequences == {5: positions}
    assert newest(str(tmp_path), "another") is None


def test_numbers_count_upwards_also_beyond_what_was_removed_or_never_completed(tmp_path: Path) -> None:
    assert Path(save(tmp_path).path).name == "000001"
    Path(next_path(str(tmp_path), SERVICE)).mkdir()
    assert Path(next_path(str(tmp_path), SERVICE)).name == "000003"
    (tmp_path / "saves" / SERVICE / f"000007{GENERATION}").mkdir()
    assert Path(next_path(str(tmp_path), SERVICE)).name == "000008"
    (tmp_path / "saves" / SERVICE / f"000009{GENERATION}.orbax-checkpoint-tmp-1").mkdir()
    assert Path(next_path(str(tmp_path), SERVICE)).name == "000010"
    (tmp_path / "saves" / SERVICE / "999999").mkdir()
    assert Path(save(tmp_path, 77).path).name == "1000000"
    found = newest(str(tmp_path), SERVICE)
    assert found is not None and found.sequences == {5: 77}, "by number, not by name"


def test_what_was_cut_off_or_damaged_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path)
    Path(next_path(str(tmp_path), SERVICE), "worker-a").mkdir(parents=True)
    damaged = save(tmp_path)
    content = Path(damaged.path, SAVED).read_bytes()
    for wrong in (content[:-3], b"", b"{}"):
        Path(damaged.path, SAVED).write_bytes(wrong)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest(str(tmp_path), SERVICE) == good
        assert ["cannot be read" in record.message for record in caplog.records] == [True, False]
        assert "cut off" in caplog.records[1].message


def test_a_directory_that_was_moved_is_read_where_it_is(tmp_path: Path) -> None:
    save(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found = newest(str(tmp_path / "new"), SERVICE)
    assert found is not None and Path(found.path) == tmp_path / "new" / "saves" / SERVICE / "000001"
    assert found.digests == {5: "digest"} and (found.epoch, found.replicas) == (3, 2)


def test_paths_are_good_for_processes_that_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_path("here", SERVICE) == str(tmp_path / "here" / "saves" / SERVICE / "000001")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert next_path("~/there", SERVICE) == str(tmp_path / "there" / "saves" / SERVICE / "000001")


def test_a_checkpoint_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves" / SERVICE).write_bytes(b"")
    for look in (next_path, newest):
        with pytest.raises(CheckpointError, match="cannot be read"):
            look(str(tmp_path), SERVICE)
    with pytest.raises(CheckpointError, match=r"saved\.json cannot be written"):
        complete(str(tmp_path / "saves" / SERVICE / "000001"), SERVICE, 1, 1, {})


@pytest.mark.parametrize("written", [True, False])
def test_saves_are_for_their_user_alone_whatever_the_umask(tmp_path: Path, written: bool) -> None:
    path = Path(next_path(str(tmp_path), SERVICE))
    before = os.umask(0)
    try:
        if written:
            save_kv(path, frame((0, FORM.layers), pages_of(1, 9)))
        complete(str(path), SERVICE, 1, 1, {1: 9})
    finally:
        os.umask(before)
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert SAVED in names and ("manifest.ocdbt" in names) is written
    made = [path, path.parent, path.parent.parent, *([path / "w"] if written else [])]
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in made} == {0o700}


def test_what_was_given_up_is_removed_and_what_cannot_be_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(next_path(str(tmp_path), SERVICE))
    (path / "worker-a" / "000001").mkdir(parents=True)
    discard(str(path))
    assert not path.exists()
    discard(str(path))
    assert not caplog.records

    def refuse(path: epath.Path, missing_ok: bool) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(epath.Path(path)), "rmtree", refuse)
    discard(str(path))
    assert "cannot be removed: not yours" in caplog.text


def left(checkpoint: Path, service: str = SERVICE) -> list[str]:
    return sorted(path.name for path in (checkpoint / "saves" / service).iterdir())


def begin(checkpoint: Path) -> Path:
    """A save that is not complete."""
    path = Path(next_path(str(checkpoint), SERVICE))
    (path / "worker-a" / "000001").mkdir(parents=True)
    return path


def test_the_newest_complete_saves_stay_and_what_is_older_is_removed(tmp_path: Path) -> None:
    other = save(tmp_path, service="another")
    first = save(tmp_path)
    Path(f"{first.path}{GENERATION}").mkdir()
    Path(f"{first.path}{GENERATION}.orbax-checkpoint-tmp").mkdir()
    begin(tmp_path)  # cut off
    remove_older(save(tmp_path).path)
    assert len(left(tmp_path)) == 5, "of two complete saves none is too many"
    begun = begin(tmp_path)
    remove_older(save(tmp_path).path)
    assert left(tmp_path) == ["000003", "000004", "000005"]
    Path(save(tmp_path).path, "worker-a").mkdir()
    last = save(tmp_path)
    remove_older(last.path, {str(begun)})
    assert left(tmp_path) == ["000004", "000006", "000007"], "what is being written stays"
    assert newest(str(tmp_path), SERVICE) == last and newest(str(tmp_path), "another") == other


def test_older_saves_that_cannot_be_looked_at_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path).path
    (tmp_path / "saves" / SERVICE).rename(tmp_path / "elsewhere")
    (tmp_path / "saves" / SERVICE).write_bytes(b"")
    remove_older(path)
    assert "older saves cannot be removed" in caplog.text


def test_a_process_that_looks_for_saves_needs_no_jax() -> None:
    program = f"import sys, {saves.__name__}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_contents_tell_complete_saves_from_others(tmp_path: Path) -> None:
    save(tmp_path, 10)
    Path(next_path(str(tmp_path), SERVICE)).mkdir()
    (tmp_path / "saves" / SERVICE / f"000003{GENERATION}").mkdir()
    save(tmp_path, 4, service="another")
    contents = contents_of(str(tmp_path))
    assert contents.parameters is None
    assert contents.saves == (
        StoredSave("another", 1, "complete", 3, 1, 4, False),
        StoredSave(SERVICE, 1, "complete", 3, 1, 10, False),
        StoredSave(SERVICE, 2, "cut off", 0, 0, 0, False),
        StoredSave(SERVICE, 3, "none", 0, 0, 0, True),
    )
    (tmp_path / "parameters").mkdir()
    stored = contents_of(str(tmp_path)).parameters
    assert stored is not None and not stored.complete
    with pytest.raises(CheckpointError, match="there is no directory"):
        contents_of(str(tmp_path / "nowhere"))
