"""Workers as child processes, with stand-ins for the worker: names, signals, and that nothing is left behind."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from command_line import until
from hypothesis import given
from hypothesis import strategies as st

from spotjax import cli
from spotjax.config import ServeConfig, mode
from spotjax.errors import ConfigError, Draining, UnknownInstance
from spotjax.local_workers import (
    LocalWorkers,
    cuda_devices,
    die_with_parent,
    free_numbers,
    stores_of,
    worker_command,
    worker_environment,
)
from spotjax.settings import load

ADDRESS = "127.0.0.1:1"
CONFIG = ServeConfig(workers=2, parameter_store="off")
WILLING = "import pathlib, signal; pathlib.Path({file!r}).write_text('up'); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WILLING
MOURNING = """
import pathlib, signal, sys
def told(*_):
    pathlib.Path({file!r}).write_text('told')
    sys.exit(0)
signal.signal(signal.SIGTERM, told)
pathlib.Path({file!r}).write_text('up')
signal.pause()
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes die with their parent on Linux only")


class StandIns:
    """Local workers that run a line of Python, and what the lines wrote.

    Attributes:
      exits: names and exit codes in the order in which they were reported.
    """

    def __init__(self, directory: Path, program: str, config: ServeConfig) -> None:
        self.directory, self.program = directory, program
        self.exits: list[tuple[str, int]] = []
        self.workers = LocalWorkers(
            config, ADDRESS, command=self._command, on_exit=lambda *ended: self.exits.append(ended)
        )

    def _command(self, config: ServeConfig, address: str, name: str) -> list[str]:
        return [sys.executable, "-S", "-c", self.program.format(file=str(self.directory / name))]

    def says(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    async def up(self, count: int) -> tuple[str, ...]:
        names = await self.workers.add(count)
        await until(lambda: all(self.says(name) == "up" for name in names))
        return names


@pytest.fixture
async def stand_ins(tmp_path: Path) -> AsyncIterator[Callable[..., StandIns]]:
    """Makes stand-ins; stops all of them at the end."""
    made: list[StandIns] = []

    def make(program: str = WILLING, config: ServeConfig = CONFIG) -> StandIns:
        made.append(StandIns(tmp_path, program, config))
        return made[-1]

    yield make
    for each in made:
        await each.workers.stop(0)
        assert each.workers.processes == {}


async def test_workers_get_names_in_order_and_those_of_the_dead_first(stand_ins: Callable[..., StandIns]) -> None:
    fleet = stand_ins()
    assert await fleet.up(3) == ("instance-0", "instance-1", "instance-2")
    fleet.workers.signal("instance-1", signal.SIGKILL)
    await until(lambda: fleet.exits)
    assert fleet.exits == [("instance-1", -signal.SIGKILL)]
    assert list(fleet.workers.processes) == ["instance-0", "instance-2"]
    assert await fleet.workers.add(2) == ("instance-1", "instance-3")


async def test_stopping_asks_everybody_before_it_waits_and_leaves_no_process(
    stand_ins: Callable[..., StandIns], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fleet = stand_ins(MOURNING)
    names = await fleet.up(2)
    pids = list(fleet.workers.processes.values())
    await fleet.workers.stop(60)
    assert [fleet.says(name) for name in names] == ["told", "told"]
    assert sorted(fleet.exits) == [("instance-0", 0), ("instance-1", 0)]
    assert not any(exists(pid) for pid in pids)
    ended = [record for record in caplog.records if record.getMessage() == "worker ended"]
    assert [record.levelname for record in ended] == ["INFO", "INFO"]
    assert {(record.instance, record.ended_by) for record in ended} == {(name, "exit code 0") for name in names}  # type: ignore[attr-defined]


async def test_who_does_not_go_is_killed_after_the_deadline_stopped_ones_too(
    stand_ins: Callable[..., StandIns], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = stand_ins(STUBBORN)
    await fleet.up(2)
    fleet.workers.signal("instance-1", signal.SIGSTOP)
    await fleet.workers.stop(0.05)
    assert sorted(fleet.exits) == [("instance-0", -signal.SIGKILL), ("instance-1", -signal.SIGKILL)]
    assert sum("does not end" in record.getMessage() for record in caplog.records) == 2


async def test_what_a_worker_started_goes_with_it(stand_ins: Callable[..., StandIns], tmp_path: Path) -> None:
    parent = (
        "import pathlib, signal, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()']); "
        "pathlib.Path({file!r} + '-child').write_text(str(child.pid)); " + WILLING
    )
    fleet = stand_ins(parent)
    await fleet.up(1)
    child = int((tmp_path / "instance-0-child").read_text())
    assert exists(child)
    fleet.workers.signal("instance-0", signal.SIGTERM)  # which does not reach the child
    await until(lambda: not exists(child))


async def test_an_end_that_nobody_asked_for_is_a_warning(
    stand_ins: Callable[..., StandIns], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = stand_ins("import sys; sys.exit(3)")
    await fleet.workers.add(1)
    await until(lambda: fleet.exits)
    (record,) = [record for record in caplog.records if record.getMessage() == "worker ended"]
    assert (record.levelname, record.ended_by) == ("WARNING", "exit code 3")  # type: ignore[attr-defined]


async def test_a_terminals_interrupt_does_not_reach_the_workers(stand_ins: Callable[..., StandIns]) -> None:
    fleet = stand_ins()
    await fleet.up(1)
    (pid,) = fleet.workers.processes.values()
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


async def test_unknown_names_and_workers_after_the_stop_are_refused(stand_ins: Callable[..., StandIns]) -> None:
    fleet = stand_ins()
    await fleet.up(1)
    with pytest.raises(UnknownInstance, match=r"'instance-7'.*there are instance-0$"):
        fleet.workers.signal("instance-7", signal.SIGTERM)
    adding, stopping = await asyncio.gather(fleet.workers.add(1), fleet.workers.stop(60))
    assert (adding, stopping, fleet.workers.processes) == (("instance-1",), None, {})
    with pytest.raises(Draining):
        await fleet.workers.add(1)


async def test_stopping_removes_the_parameters_that_workers_kept(
    stand_ins: Callable[..., StandIns], tmp_path: Path
) -> None:
    from spotjax.reshard.store_directory import SHARD, store_path

    store = tmp_path / "store"
    fleet = stand_ins(WILLING, ServeConfig(workers=1, parameter_store=str(store)))
    await fleet.up(1)
    mine = stores_of(ServeConfig(parameter_store=str(store)), ADDRESS)
    assert mine is not None and mine.parent == store, "two servers of one user do not share stores"
    kept = [store_path(mine, name) for name in ("instance-0", "instance-1")]
    for path in kept:
        path.mkdir(parents=True)
        (path / f"a{SHARD}").write_bytes(b"x")
    await fleet.workers.stop(60)
    assert [path.exists() for path in kept] == [False, True]  # the other one is not ours


async def test_what_workers_of_a_killed_server_left_long_ago_is_removed(
    stand_ins: Callable[..., StandIns], tmp_path: Path
) -> None:
    from spotjax.reshard.store_directory import SHARD, store_path

    left = {age: tmp_path / f"spotjax-{os.getuid()}-workers-{age}" for age in (10, 10_000)}
    for age, stores in left.items():
        path = store_path(stores, "instance-0")
        path.mkdir(parents=True)
        (path / f"a{SHARD}").write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    fleet = stand_ins(WILLING, ServeConfig(workers=1, parameter_store=str(tmp_path)))
    await fleet.up(1)
    assert [stores.exists() for stores in left.values()] == [True, False], "its workers may yet come back"
    await fleet.workers.stop(60)


@asynccontextmanager
async def parent_process(program: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process whose standard error all of its descendants inherit."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


PARENT = f"""
import asyncio, sys
from spotjax.config import ServeConfig
from spotjax.local_workers import LocalWorkers

CHILD = "import spotjax.local_workers as w, os, signal; w.die_with_parent(); os.write(1, b'up\\\\n'); signal.pause()"

async def main():
    workers = LocalWorkers(ServeConfig(workers=2), {ADDRESS!r}, command=lambda *_: [sys.executable, "-c", CHILD])
    await workers.add(2)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@linux_only
async def test_workers_die_with_a_parent_that_is_killed() -> None:
    async with parent_process(PARENT) as parent:
        assert parent.stderr is not None
        for _ in range(2):
            assert await parent.stderr.readline() == b"up\n"  # standard output of the workers, see LocalWorkers
        parent.kill()
        assert await parent.stderr.read() == b""  # the end of the file: nobody holds it any more


@linux_only
async def test_a_worker_whose_parent_died_before_it_could_ask_dies_at_once() -> None:
    program = "import os; os.environ['SPOTJAX_PARENT'] = '1'; import spotjax.local_workers as w; w.die_with_parent()"
    async with parent_process(f"{program}; print('still there')") as process:
        out, _ = await process.communicate()
        assert (process.returncode, out) == (-signal.SIGKILL, b"")


def test_a_process_that_nobody_started_as_a_worker_outlives_its_parent() -> None:
    die_with_parent({})
    with pytest.raises(ConfigError, match="SPOTJAX_PARENT"):
        die_with_parent({"SPOTJAX_PARENT": "me"})


@given(st.sets(st.integers(0, 20)), st.integers(0, 10))
def test_free_numbers_are_the_lowest_that_nobody_has(taken: set[int], count: int) -> None:
    free = free_numbers(taken, count)
    assert len(free) == count and free == sorted(set(free)) and not taken & set(free)
    assert all(number in taken or number in free for number in range(max(free, default=0)))


def test_a_worker_is_told_what_its_machine_needs_and_nothing_else() -> None:
    assert worker_command(ServeConfig(workers=4, model="m", kv_pages=9), ADDRESS, "instance-3")[1:] == [
        "-m", "spotjax.serve", f"--join={ADDRESS}", "--name=instance-3",
    ]  # fmt: skip
    config = ServeConfig(
        workers=4, devices_per_instance=1, instance_memory_bytes=5, attention="xla", cpu_kernels="xla",
        compilation_cache="off", parameter_store="/p", grace_seconds=2.5, tls_certificate="c", tls_key="k",
        tls_authority="a", log_level="debug", log_format="json",
    )  # fmt: skip
    flags = worker_command(config, ADDRESS, "instance-3")[3:]
    told = load(cli.parser().parse_args(["serve", *flags]), {})
    assert mode(told) == "worker"
    changed = {"workers": 4, "join": "", "name": ""}
    assert told == ServeConfig(
        **{f: getattr(config, f) for f in config.__struct_fields__ if f not in changed}, join=ADDRESS, name="instance-3"
    )


def test_workers_on_every_address_are_told_one() -> None:
    seen: list[str] = []

    async def add() -> None:
        workers = LocalWorkers(CONFIG, "0.0.0.0:99", command=lambda _, address, __: seen.append(address) or ["true"])  # type: ignore[func-returns-value]
        await workers.add(1)
        await workers.stop(60)

    asyncio.run(add())
    assert seen == ["127.0.0.1:99"]


def test_workers_inherit_no_settings_by_the_environment_and_see_devices_of_their_own() -> None:
    environment = {"PATH": "/bin", "SPOTJAX_WORKERS": "4", "SPOTJAX_CACHE": "/c", "CUDA_VISIBLE_DEVICES": "7,5,3,1"}
    assert worker_environment(environment, 12, 1, 2) == {
        "PATH": "/bin",
        "SPOTJAX_CACHE": "/c",
        "SPOTJAX_PARENT": "12",
        "CUDA_VISIBLE_DEVICES": "3,1",
    }
    assert [cuda_devices(None, number, 3) for number in (0, 2)] == ["0,1,2", "6,7,8"]
    assert cuda_devices("", 0, 2) == ""


def exists(pid: int) -> bool:
    """Whether a process is alive; one that has ended and was not reaped is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
