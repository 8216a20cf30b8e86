"""Programs that add, list and remove machines: the contract, what goes wrong with programs, and that none is left."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from provider_contract import FLEET, Case, ProviderContract, Watching, by_name

from spotjax import settings
from spotjax.config import ServeConfig
from spotjax.errors import (
    ConfigError,
    OutOfCapacity,
    ProviderError,
    ProviderRefused,
    ProviderUnavailable,
    QuotaExceeded,
)
from spotjax.fleet.providers import command_run
from spotjax.fleet.providers.command import CommandConfig, CommandOffer, CommandProvider
from spotjax.fleet.providers.command_run import run
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, Provider

PROGRAM = str(Path(__file__).with_name("machines_program.sh"))
BIG = Offer("big", "a", "spot", 1.5)
ENVIRONMENT = {"PATH": os.environ["PATH"]}


def provider_for(directory: Path, fleet: FleetIdentity = FLEET, **settings: object) -> CommandProvider:
    """Of the program whose cloud is a directory."""
    command = (PROGRAM, str(directory))
    config = CommandConfig(command=command, poll_seconds=0.05, **settings)  # type: ignore[arg-type]
    return CommandProvider(config, fleet, ENVIRONMENT)


def program(directory: Path, body: str) -> str:
    """The path of a shell script."""
    path = directory / "script"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def script(directory: Path, body: str, **settings: object) -> CommandProvider:
    """Of a shell script; offers are known."""
    offers = (CommandOffer(type="big", zone="a", price=1.5),)
    config = CommandConfig(command=(program(directory, body),), offers=offers, **settings)  # type: ignore[arg-type]
    return CommandProvider(config, FLEET, ENVIRONMENT)


class TestContract(ProviderContract):
    """See ``ProviderContract``."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        async def opened(fleet: FleetIdentity) -> Provider:
            return provider_for(tmp_path, fleet)

        def writes(name: str, content: str) -> Callable[[], Awaitable[None]]:
            async def write() -> None:
                (tmp_path / name).write_text(content)

            return write

        async def preempt(name: str) -> None:
            path = tmp_path / f"{name}.contract.machine"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "preempted"}) + "\n")

        errors = {"10": OutOfCapacity, "11": QuotaExceeded, "12": ProviderRefused, "75": ProviderUnavailable}
        errors |= {"1": ProviderUnavailable, "2": ProviderRefused, "127": ProviderRefused}
        return Case(
            opened, preempt=preempt, exhaust=writes("capacity", "1"), refresh=writes("capacity", "9"),
            fails={code: (error, writes("fails", code)) for code, error in errors.items()},
            lose_answer=writes("loses", "yes"), existing=lambda: len(list(tmp_path.glob("*.machine"))),
        )  # fmt: skip


async def test_a_program_is_told_what_to_rent_for_whom_and_says_what_it_costs(tmp_path: Path) -> None:
    provider = provider_for(tmp_path)
    assert await provider.offers() == (BIG, Offer("big", "a", "on_demand", 4.0))
    machine = await provider.request("m-0", Offer("big", "a", "on_demand", 1.0))
    assert machine == Machine("m-0", Offer("big", "a", "on_demand", 4.0), MachineState.RUNNING, "127.0.0.1:1", 7.0)
    assert (tmp_path / "calls").read_text().split("\n")[:3] == ["offers ", "list ", "request m-0"]


async def test_a_program_gets_no_settings_of_the_server_but_what_a_worker_started_by_it_needs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writes = program(tmp_path, f"[ $1 = list ] || env > {out}")
    offers = (CommandOffer(type="t", price=1),)
    config = CommandConfig(command=(writes,), environment={"AWS_PROFILE": "me"}, offers=offers)
    server = {"SPOTJAX_LISTEN": "1.2.3.4:5", "SPOTJAX_CACHE": "/c", "HOME": "/h"}
    fleet = FleetIdentity("mine", "10.0.0.1:8470", ServeConfig())
    await CommandProvider(config, fleet, ENVIRONMENT | server).request("m-7", offers[0].offer)
    seen = dict(line.split("=", 1) for line in out.read_text().splitlines())
    seen = {key: value for key, value in seen.items() if key not in ("PWD", "OLDPWD", "SHLVL", "_", "PATH")}
    assert seen == {
        "SPOTJAX_CACHE": "/c", "HOME": "/h", "SPOTJAX_FLEET": "mine", "SPOTJAX_JOIN": "10.0.0.1:8470",
        "SPOTJAX_NAME": "m-7", "SPOTJAX_TYPE": "t", "SPOTJAX_ZONE": "", "SPOTJAX_PRICE_CLASS": "spot",
        "AWS_PROFILE": "me",
    }  # fmt: skip
    worker = settings.from_environment(seen)
    assert worker == {"join": "10.0.0.1:8470", "name": "m-7", "zone": "", "price_class": "spot"}


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (
            "echo; echo first >&2; echo why >&2; echo >&2; exit 75",
            ProviderUnavailable,
            "script list ended with 75: why$",
        ),
        ("exit 1", ProviderUnavailable, "ended with 1: it said nothing"),
        ("kill -9 $$", ProviderUnavailable, "ended with -9"),
        ("nonsense-that-is-no-program", ProviderRefused, "ended with 127: .*nonsense"),
        ("echo hello", ProviderRefused, "wrote a line 1 that is wrong: JSON is malformed"),
        ("""echo '{"name":"m"}'""", ProviderRefused, "line 1 .*missing required field `type`"),
        (
            """echo; echo '{"name":"m","type":"big","state":"up"}'""",
            ProviderRefused,
            "line 2 .*Invalid enum value 'up'",
        ),
        (
            """echo '{"name":"m","type":"small","state":"running"}'""",
            ProviderRefused,
            "m is small as spot, and no offer",
        ),
        ("sleep 1234 & sleep 1234", ProviderUnavailable, "did not end within 0.5 s and was killed"),
        ("while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done", ProviderUnavailable, "wrote more than 40000 bytes"),
    ],
)
async def test_what_goes_wrong_with_a_program_is_told_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: type[ProviderError], message: str
) -> None:
    monkeypatch.setattr(command_run, "MOST_BYTES", 40_000)
    provider = script(tmp_path, body, timeout_seconds=0.5 if "sleep" in body else 60.0)
    with pytest.raises(ProviderError, match=message) as raised:
        await provider.list()
    assert type(raised.value) is error
    assert not psutil.Process().children()
    async with asyncio.timeout(60):  # they are killed, but not by us alone: the kernel takes its time
        while any(sleeps(process) for process in psutil.process_iter(["cmdline", "status"])):
            await asyncio.sleep(0.01)


def sleeps(process: psutil.Process) -> bool:
    """Whether it is one that the program above left; those that nobody has reaped yet are no more."""
    return process.info["cmdline"] == ["sleep", "1234"] and process.info["status"] != psutil.STATUS_ZOMBIE  # type: ignore[attr-defined]


async def test_errors_of_a_program_that_says_a_lot_are_kept_from_their_end(tmp_path: Path) -> None:
    provider = script(tmp_path, "i=0; while [ $i -lt 9999 ]; do echo no >&2; i=$((i+1)); done; echo last >&2; exit 11")
    with pytest.raises(QuotaExceeded, match=r"ended with 11: last$"):
        await provider.list()


async def test_a_program_that_there_is_not_is_refused(tmp_path: Path) -> None:
    config = CommandConfig(command=(str(tmp_path / "nothing"),))
    with pytest.raises(ProviderRefused, match=r"nothing cannot be run: .*No such file"):
        await CommandProvider(config, FLEET, ENVIRONMENT).offers()


async def test_what_is_left_in_the_background_stays_if_it_lets_go_of_the_output(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    provider = script(tmp_path, f"sleep 1000 >/dev/null 2>&1 & echo $! > {pid}")
    assert await provider.list() == ()
    left = psutil.Process(int(pid.read_text()))
    assert left.is_running()
    left.kill()
    psutil.wait_procs([left])


async def test_who_holds_the_output_outside_of_the_group_does_not_hold_up_the_provider(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    daemon = f"setsid sh -c 'echo $$ > {pid}; exec sleep 1000'"
    provider = script(tmp_path, f"{daemon} &\nwhile [ ! -s {pid} ]; do sleep 0.01; done", timeout_seconds=2)
    began = time.monotonic()
    with pytest.raises(ProviderUnavailable, match="did not end within 2 s"):
        await provider.list()
    assert time.monotonic() - began < 60
    os.kill(int(pid.read_text()), signal.SIGKILL)


async def test_a_call_that_is_given_up_kills_its_program(tmp_path: Path) -> None:
    task = asyncio.create_task(run([sys.executable, "-SIc", "import signal; signal.pause()"], ENVIRONMENT, 3600.0))
    async with asyncio.timeout(60):
        while not psutil.Process().children():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.Process().children()


async def test_a_request_that_says_nothing_is_one_that_waits_and_one_that_names_another_machine_is_refused(
    tmp_path: Path,
) -> None:
    assert await script(tmp_path, "").request("m", BIG) == Machine("m", BIG, MachineState.WAITING)
    line = """[ $1 = list ] || echo '{"name":"other","type":"big","zone":"a","state":"starting"}'"""
    with pytest.raises(ProviderRefused, match="script request was to make m, but names other"):
        await script(tmp_path, line).request("m", BIG)
    with pytest.raises(ProviderRefused, match="script offers wrote no offer"):
        await CommandProvider(CommandConfig(command=(program(tmp_path, ""),)), FLEET, ENVIRONMENT).offers()


async def test_failed_machines_say_why(tmp_path: Path) -> None:
    line = """echo '{"name":"m","type":"big","zone":"a","state":"failed","failure":"quota_exceeded","price":9}'"""
    (machine,) = await script(tmp_path, line).list()
    assert (machine.failure, machine.offer.price) == (QuotaExceeded, 9.0)


async def test_a_program_that_watches_makes_changes_known_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    machines = tmp_path / "machines"
    machines.write_text("")
    body = f'case "$1" in list) cat {machines};; watch) cat {pipe};; esac'
    provider = script(tmp_path, body, watch=True, poll_seconds=3600)
    watching = Watching(provider)
    heard = await asyncio.to_thread(pipe.open, "w")  # when somebody reads
    machines.write_text(json.dumps({"name": "m", "type": "big", "zone": "a", "state": "running"}))
    heard.write("changed\n")
    heard.flush()
    await watching.until(Case(lambda _: asyncio.sleep(0)), lambda: watching.states("m") == [MachineState.RUNNING])  # type: ignore[arg-type,return-value]
    await watching.stop()
    heard.close()
    assert not psutil.Process().children()


async def test_a_list_that_does_not_come_is_asked_for_again_by_watchers(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    line = json.dumps({"name": "m", "type": "big", "zone": "a", "state": "running"})
    provider = script(tmp_path, f"[ ! -e {broken} ] || exit 75; echo '{line}'", poll_seconds=0.01)
    with pytest.raises(ProviderUnavailable):
        await provider.list()
    watching = Watching(provider)
    await asyncio.sleep(0.05)
    broken.unlink()
    await watching.until(Case(lambda _: asyncio.sleep(0)), lambda: watching.states("m") == [MachineState.RUNNING])  # type: ignore[arg-type,return-value]
    await watching.stop()
    assert set(await by_name(provider)) == {"m"}


async def test_programs_run_side_by_side_and_those_for_one_machine_in_turn(tmp_path: Path) -> None:
    running = tmp_path / "running"
    running.mkdir()
    body = f"""[ $1 = request ] || exit 0
mkdir {running}/$SPOTJAX_NAME || exit 12
while [ "$(ls {running} | wc -l)" -lt 2 ] && [ ! -e {tmp_path}/met ]; do sleep 0.01; done
touch {tmp_path}/met; rmdir {running}/$SPOTJAX_NAME"""
    provider = script(tmp_path, body)
    names = ("a", "b", "a", "b")
    machines = await asyncio.gather(*(provider.request(name, BIG) for name in names))
    assert [machine.name for machine in machines] == list(names)


def test_offers_are_given_once() -> None:
    offer = CommandOffer(type="t", price=1)
    with pytest.raises(ConfigError, match="give each of them once"):
        CommandProvider(CommandConfig(command=("x",), offers=(offer, offer)), FLEET, {})
