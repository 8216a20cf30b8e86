"""Parameters that outlive their process: what was sealed is found again, whole and exact, and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.errors import ConfigError
from spotjax.meshes.slices import whole
from spotjax.reshard import store_directory
from spotjax.reshard.parameter_store import Key, ParameterStore, StoredShard
from spotjax.reshard.store_directory import default_directory, remove_of, store_path, sweep

FLOAT32 = np.dtype(np.float32)

Spawn = Callable[..., subprocess.Popen[str]]


def put(store: ParameterStore, device: int, name: str, content: np.ndarray) -> StoredShard:
    """A whole array, sealed."""
    shard = store.allocate(device, name, whole(content.shape), content.shape, content.dtype)
    shard.content[...] = content
    shard.seal()
    return shard


def found(store: ParameterStore) -> dict[Key, np.ndarray]:
    """Copies of what the store has."""
    return {shard.key: shard.content.copy() for shard in store.attached()}


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if not path.is_dir()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ParameterStore]:
    opened = ParameterStore.open(tmp_path, "w0", "model")
    yield opened
    opened.close()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts processes that run a script with ``store`` open on the directory of the first argument."""
    started: list[subprocess.Popen[str]] = []
    begin = """
        import sys
        import numpy as np
        from pathlib import Path
        from spotjax.reshard.parameter_store import ParameterStore
        assert "jax" not in sys.modules
        store = ParameterStore.open(Path(sys.argv[1]), "w0", "model")
    """

    def start(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        source = textwrap.dedent(begin) + textwrap.dedent(script)
        command = [*prefix, sys.executable, "-c", source, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


CASES = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16),
    np.arange(6, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn),
    np.arange(5, dtype=np.int8),
    np.full((), 3.5, np.float16),
    np.zeros((0, 7), np.float32),
    np.arange(5000, dtype=np.float64),
]


@pytest.mark.parametrize("content", CASES, ids=lambda content: f"{content.dtype}{list(content.shape)}")
def test_what_is_sealed_is_attached_with_type_shape_and_content(tmp_path: Path, content: np.ndarray) -> None:
    first = ParameterStore.open(tmp_path, "w0", "model")
    put(first, 3, "layers.0.query", content)
    first.close()
    [shard] = ParameterStore.open(tmp_path, "w0", "model").attached()
    assert shard.key == (3, "layers.0.query", whole(content.shape))
    assert shard.content.dtype == content.dtype and shard.content.shape == content.shape
    np.testing.assert_array_equal(shard.content, content)


def test_padding_follows_what_the_index_covers(store: ParameterStore) -> None:
    shard = store.allocate(1, "head", ((6, 8), (0, 5)), (3, 5), FLOAT32)
    assert not shard.content.any(), "padding is zeros unless written"
    shard.content[:2] = 1
    shard.seal()
    [attached] = store.attached()
    assert attached.key == (1, "head", ((6, 8), (0, 5)))
    assert attached.content.sum() == 10 and attached.content.shape == (3, 5)


def test_names_longer_than_a_page_move_the_content_to_a_later_page(store: ParameterStore) -> None:
    shard = put(store, 0, "x" * 10_000, np.arange(9.0))
    [attached] = store.attached()
    assert attached.key == shard.key and attached.content.ctypes.data % 4096 == 0
    np.testing.assert_array_equal(attached.content, np.arange(9.0))


def test_a_shard_that_is_not_sealed_is_not_found(tmp_path: Path) -> None:
    first = ParameterStore.open(tmp_path, "w0", "model")
    first.allocate(0, "a", whole((4,)), (4,), FLOAT32)
    assert not first.attached()
    first.close()
    second = ParameterStore.open(tmp_path, "w0", "model")
    assert not second.attached() and not files(tmp_path)


def test_a_discarded_shard_leaves_no_file(store: ParameterStore, tmp_path: Path) -> None:
    store.allocate(0, "a", whole((4,)), (4,), FLOAT32).discard()
    put(store, 0, "b", np.ones(4)).discard()
    assert not files(tmp_path)


def test_sealing_again_under_a_key_replaces_the_shard_and_leaves_the_old_memory_alone(store: ParameterStore) -> None:
    old = put(store, 0, "a", np.ones(4))
    put(store, 0, "a", np.full(4, 2.0))
    assert {shard.content[0] for shard in store.attached()} == {2.0}
    np.testing.assert_array_equal(old.content, np.ones(4))


def test_a_sealed_content_cannot_be_written(store: ParameterStore) -> None:
    for shard in (put(store, 0, "a", np.ones(4)), *store.attached()):
        with pytest.raises(ValueError, match="read-only"):
            shard.content[0] = 5


def test_another_fingerprint_finds_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    first = ParameterStore.open(tmp_path, "w0", "model float32")
    put(first, 0, "a", np.ones(4))
    first.close()
    other = ParameterStore.open(tmp_path, "w0", "model bfloat16")
    assert not other.attached() and not files(tmp_path)
    put(ParameterStore.open(tmp_path, "w1", "model float32"), 0, "a", np.ones(4))
    assert not other.attached(), "instances share nothing"


operations = st.lists(
    st.one_of(
        st.tuples(st.just("seal"), st.integers(0, 1), st.sampled_from("abc"), st.integers(1, 4), st.integers(0, 255)),
        st.tuples(st.just("leave"), st.integers(0, 1), st.sampled_from("abc"), st.integers(1, 4), st.integers(0, 255)),
        st.tuples(st.just("keep"), st.sets(st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(1, 4)))),
        st.tuples(st.just("restart")),
    ),
    max_size=25,
)


@given(operations)
@settings(max_examples=60, deadline=None)
def test_the_store_has_what_was_sealed_last_and_kept_through_every_restart(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]
) -> None:
    directory = tmp_path_factory.mktemp("stores")
    store = ParameterStore.open(directory, "w0", "model")
    expected: dict[Key, int] = {}
    for step in steps:
        match step:
            case ("seal" | "leave" as what, int(device), str(name), int(size), int(value)):
                shard = store.allocate(device, name, whole((size,)), (size,), np.dtype(np.uint8))
                shard.content[:] = value
                if what == "seal":
                    shard.seal()
                    expected[shard.key] = value
            case ("keep", set(kept)):
                keys = {(device, name, whole((size,))) for device, name, size in kept}
                store.keep(keys)
                expected = {key: value for key, value in expected.items() if key in keys}
            case _:
                store.close()
                store = ParameterStore.open(directory, "w0", "model", patience=0)
                assert len(files(directory)) == len(expected)
        actual = found(store)
        assert actual.keys() == expected.keys()
        assert all((actual[key] == value).all() for key, value in expected.items())
    store.remove()
    assert not list(directory.iterdir())


SIZE = 300_000

# Every content is its number, again and again.
WRITE_UNTIL_KILLED = f"""
    for number in range(int(sys.argv[2]), 1 << 24):
        shard = store.allocate(number % 2, f"a{{number % 7}}", ((0, {SIZE}),), ({SIZE},), np.dtype(np.float32))
        shard.content[:] = number
        shard.seal()
        print(number, flush=True)
"""


def test_after_a_kill_at_any_moment_exactly_the_sealed_shards_are_attached(tmp_path: Path, spawn: Spawn) -> None:
    moments = random.Random(7)
    expected: dict[Key, int] = {}
    for start in range(0, 12_000, 1000):
        process = spawn(WRITE_UNTIL_KILLED, tmp_path, start)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(moments.randrange(1, 12))]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.003))
        process.kill()
        process.wait()
        printed = int([*lines, *process.stdout][-1])
        store = ParameterStore.open(tmp_path, "w0", "model", patience=0)
        actual = found(store)
        assert all((content == content[0]).all() for content in actual.values()), "no shard has parts of two"
        numbers = {key: int(content[0]) for key, content in actual.items()}
        newest = max(numbers.values())
        assert newest in (printed, printed + 1), "the last one may be sealed and not printed yet"
        expected |= {(number % 2, f"a{number % 7}", whole((SIZE,))): number for number in range(start, newest + 1)}
        assert numbers == expected
        assert len(files(tmp_path)) == len(expected), "nothing unfinished is left"
        store.close()


def test_a_process_killed_while_it_writes_leaves_no_trace_of_that_shard(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn(
        """
        shard = store.allocate(0, "whole", ((0, 10),), (10,), np.dtype(np.float32))
        shard.seal()
        shard = store.allocate(0, "half", ((0, 10_000),), (10_000,), np.dtype(np.float32))
        shard.content[:5000] = 1
        print("written", flush=True)
        sys.stdin.read()
        """,
        tmp_path,
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert len(files(tmp_path)) == 2
    process.kill()
    store = ParameterStore.open(tmp_path, "w0", "model")
    assert [shard.key[1] for shard in store.attached()] == ["whole"]
    assert len(files(tmp_path)) == 1


def flip(offset: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[offset] ^= 1
        file.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "checksum": flip(3),
    "length of the header": flip(17),
    "header": flip(25),
    "first byte of the content": flip(4096),
    "last byte of the content": flip(-1),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 4096),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "empty": lambda file: os.truncate(file, 0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_reported_and_removed_and_the_others_are_attached(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = ParameterStore.open(tmp_path, "w0", "model")
    put(first, 0, "a", np.arange(4096))
    [victim] = files(tmp_path)
    put(first, 0, "b", np.arange(4096))
    first.close()
    damage(victim)
    second = ParameterStore.open(tmp_path, "w0", "model")
    with caplog.at_level(logging.WARNING):
        assert [shard.key[1] for shard in second.attached()] == ["b"]
    assert str(victim) in caplog.text and not victim.exists()


def test_one_process_at_a_time_has_a_store(tmp_path: Path, store: ParameterStore) -> None:
    with pytest.raises(ConfigError, match=r"another live process is instance 'w0'.*another name"):
        ParameterStore.open(tmp_path, "w0", "other model", patience=0.05)
    ParameterStore.open(tmp_path, "w1", "model").close()
    put(store, 0, "a", np.ones(4))
    assert len(store.attached()) == 1, "the refused one removed nothing"
    store.close()
    store.close()
    assert len(ParameterStore.open(tmp_path, "w0", "model", patience=0).attached()) == 1


def test_a_killed_process_lets_go_of_its_store_at_once(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn('print("open", flush=True)\nsys.stdin.read()', tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match="another live process"):
        ParameterStore.open(tmp_path, "w0", "model", patience=0)
    assert not remove_of(tmp_path, "w0")
    process.kill()
    ParameterStore.open(tmp_path, "w0", "model").remove()


def test_a_process_on_its_way_out_is_waited_for(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn('print("open", flush=True)\nsys.stdin.read()', tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    assert process.stdin is not None
    process.stdin.close()
    ParameterStore.open(tmp_path, "w0", "model", patience=60).remove()


def test_a_directory_that_is_removed_while_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = store_path(tmp_path, "w0"), fcntl.flock

    def too_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.rmdir()
        ParameterStore.open(tmp_path, "w0", "model").close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    store = ParameterStore.open(tmp_path, "w0", "model")
    put(store, 0, "a", np.ones(4))
    assert not remove_of(tmp_path, "w0"), "the lock is on the directory that is there"
    assert len(store.attached()) == 1


def in_small_memory() -> tuple[str, ...]:
    """A command that runs its arguments where ``/mnt`` is a tmpfs of 4 MiB that ends with it. Empty if refused."""
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /mnt && exec "$@"', "sh")
    allowed = shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    return mount if allowed else ()


SMALL_MEMORY = in_small_memory()


@pytest.mark.skipif(not SMALL_MEMORY, reason="needs a mount namespace")
def test_full_memory_is_an_error_at_allocation_and_never_a_signal(spawn: Spawn) -> None:
    process = spawn(
        """
        shards = []
        try:
            while True:
                shards.append(store.allocate(0, f"a{len(shards)}", ((0, 250_000),), (250_000,), np.dtype(np.float32)))
        except OSError as problem:
            print(problem.errno, problem.filename, problem.strerror)
        for number, shard in enumerate(shards):
            shard.content[:] = number
            shard.seal()
        attached = store.attached()
        print(len(shards), sorted(set(float(value) for shard in attached for value in shard.content)))
        store.keep(())
        del shards, shard, attached
        print(store.room() > 3 << 20)
        store.remove()
        """,
        "/mnt",
        prefix=SMALL_MEMORY,
    )
    output, _ = process.communicate()
    [problem, shards, room] = output.splitlines()
    path = store_path(Path("/mnt"), "w0")
    assert problem == f"{errno.ENOSPC} {path} no room for 1004096 bytes of parameters (No space left on device)"
    assert shards == "4 [0.0, 1.0, 2.0, 3.0]"
    assert room == "True" and process.returncode == 0


def test_a_failed_allocation_leaves_the_store_as_it_was(
    store: ParameterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 0, "a", np.ones(4))
    before = files(tmp_path)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for 4112 bytes of parameters") as caught:
        store.allocate(0, "b", whole((4,)), (4,), FLOAT32)
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == before and len(store.attached()) == 1


def test_systems_without_fallocate_reserve_memory_by_writing(
    store: ParameterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    shard = store.allocate(0, "a", whole((700_000,)), (700_000,), FLOAT32)
    [file] = files(tmp_path)
    assert file.stat().st_size == 4096 + 2_800_000 <= file.stat().st_blocks * 512
    shard.seal()
    assert not store.attached()[0].content.any()


def test_more_shards_than_a_process_may_usually_have_files_open(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn(
        """
        shards = [store.allocate(0, f"a{number}", (), (), np.dtype(np.int32)) for number in range(300)]
        for shard in shards:
            shard.seal()
        print(len(store.attached()))
        """,
        tmp_path,
        prefix=("sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh"),
    )
    assert process.communicate()[0] == "300\n"


def test_room_is_what_the_file_system_has(store: ParameterStore, tmp_path: Path) -> None:
    assert 0 < store.room() <= shutil.disk_usage(tmp_path).free + (1 << 30)


def test_only_the_owner_can_look_into_a_store(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store_path(tmp_path, "w0").mkdir()
        store = ParameterStore.open(tmp_path, "w0", "model")
        put(store, 0, "a", np.ones(4))
    finally:
        os.umask(before)
    [directory] = tmp_path.iterdir()
    [file] = directory.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_another_user_or_a_link_put_in_the_place_of_a_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store_path(tmp_path, "w0").symlink_to(elsewhere)
    store_path(tmp_path, "w1").touch()
    for instance in ("w0", "w1"):
        with pytest.raises(ConfigError, match="cannot keep parameters"):
            ParameterStore.open(tmp_path, instance, "model")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ParameterStore.open(tmp_path, "w2", "model")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=300), min_size=2, max_size=4, unique=True))
@settings(max_examples=40, deadline=None)
def test_every_instance_name_has_a_directory_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("stores")
    stores = [ParameterStore.open(directory, name, "model", patience=0) for name in names]
    assert len(list(directory.iterdir())) == len(names)
    for store in stores:
        store.remove()
    assert not list(directory.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "../w0", "/etc", "a\0b", "w\n0", "W0", "ü" * 200])
def test_odd_instance_names_stay_inside_the_directory(tmp_path: Path, name: str) -> None:
    store = ParameterStore.open(tmp_path, name, "model")
    assert len(list(tmp_path.iterdir())) == 1
    store.remove()


def test_removing_leaves_nothing_behind_and_contents_in_use_valid(tmp_path: Path) -> None:
    store = ParameterStore.open(tmp_path, "w0", "model")
    shard = put(store, 0, "a", np.ones(4))
    store.allocate(0, "b", whole((4,)), (4,), FLOAT32)
    store.remove()
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(shard.content, np.ones(4))
    again = ParameterStore.open(tmp_path, "w0", "model", patience=0)
    assert not again.attached()


def test_a_parent_removes_what_its_dead_workers_left(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn('store.allocate(0, "a", (), (), np.dtype(np.int32)).seal()', tmp_path)
    assert process.wait() == 0
    assert len(files(tmp_path)) == 1
    assert remove_of(tmp_path, "w0")
    assert not list(tmp_path.iterdir())
    assert remove_of(tmp_path, "w0"), "what never was is gone"


def test_sweeping_removes_old_stores_that_nobody_has_and_nothing_else(tmp_path: Path) -> None:
    live = ParameterStore.open(tmp_path, "live", "model")
    for name in ("old", "fresh"):
        store = ParameterStore.open(tmp_path, name, "model")
        put(store, 0, "a", np.ones(4))
        store.close()
    mine = tmp_path / "holiday pictures"
    mine.mkdir()
    link = tmp_path / store_path(tmp_path, "link").name
    link.symlink_to(mine)
    for path in (store_path(tmp_path, "old"), store_path(tmp_path, "live"), mine):
        os.utime(path, (0, 0))
    sweep(tmp_path, 3600)
    assert set(tmp_path.iterdir()) == {mine, link, store_path(tmp_path, "live"), store_path(tmp_path, "fresh")}
    sweep(tmp_path, 0)
    assert set(tmp_path.iterdir()) == {mine, link, store_path(tmp_path, "live")}
    live.remove()
    sweep(tmp_path / "missing", 0)


def test_files_of_others_in_a_store_are_not_removed(tmp_path: Path) -> None:
    store = ParameterStore.open(tmp_path, "w0", "model")
    note = store_path(tmp_path, "w0") / "note"
    note.touch()
    with pytest.raises(OSError, match="not empty"):
        store.remove()
    assert note.exists()


def test_the_default_is_shared_memory_if_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_directory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(store_directory, "SMALLEST_SHARED_MEMORY", 0)
    assert default_directory() == tmp_path
    monkeypatch.setattr(store_directory, "SMALLEST_SHARED_MEMORY", 1 << 80)
    monkeypatch.setenv("SPOTJAX_CACHE", "/somewhere")
    assert default_directory() == Path("/somewhere/parameters")
    monkeypatch.delenv("SPOTJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_directory() == Path("/cache/spotjax/parameters")
    monkeypatch.setattr(store_directory, "SHARED_MEMORY", tmp_path / "missing")
    assert default_directory() == Path("/cache/spotjax/parameters")


def test_the_cpu_backend_takes_contents_over_without_a_copy(store: ParameterStore) -> None:
    sealed = put(store, 0, "a", np.arange(3000, dtype=np.float32))
    for shard in (sealed, *store.attached()):
        array = jax.device_put(shard.content, jax.devices("cpu")[1])
        assert array.unsafe_buffer_pointer() == shard.content.ctypes.data
        assert shard.content.ctypes.data % mmap.PAGESIZE == 0


def test_arrays_on_devices_outlive_the_files_and_the_store(tmp_path: Path) -> None:
    store = ParameterStore.open(tmp_path, "w0", "model")
    put(store, 0, "a", np.arange(3000, dtype=np.float32))
    [array] = [jax.device_put(shard.content, jax.devices("cpu")[0]) for shard in store.attached()]
    store.keep([(0, "b", whole((3000,)))])
    assert not files(tmp_path)
    store.remove()
    del store
    np.testing.assert_array_equal(np.asarray(array * 2), np.arange(3000, dtype=np.float32) * 2)
