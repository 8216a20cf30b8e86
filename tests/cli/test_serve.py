"""``spotjax serve`` as a process: what it prints, its health while it starts, and how signals end it."""

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from spotjax.api.errors import Unavailable
from spotjax.async_client import AsyncSpotjaxClient

PROGRAM = """
import asyncio, sys, types
from types import SimpleNamespace

async def start(config, observer=None):
    from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService
    failure = asyncio.get_running_loop().create_future()
    {before}
    service = ScriptedService(delay=lambda: asyncio.sleep(config.retain_seconds))
    async def close():
        await service.stop()
        print("closed", flush=True)
    return SimpleNamespace(
        service=service, tokenizer=ByteTokenizer(), model_name=config.model, max_model_len=64, close=close,
        failure=failure, reports=dict, grammars=None,
    )

async def start_fleet(config, server, address, observer):
    assert isinstance(server, ApiServer) and address.startswith("127.0.0.1:")
    print("a controller", flush=True)
    return await start(config)

async def run(config):
    print("working for", config.join, flush=True)
    return 7

def replace(name, **functions):
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(functions)
    package, _, last = name.rpartition(".")
    setattr(importlib.import_module(package), last, module)

import importlib
from spotjax.api.server import ApiServer
replace("spotjax.embedded", start=start)
replace("spotjax.fleet_server", start=start_fleet)
replace("spotjax.worker.process", run=run)
from spotjax.serve import main
sys.exit(main())
"""


EVERYWHERE = ("--listen", "0.0.0.0:0", "--http", "off", "--durability", "none", "--instances", "2")
HERE = ("--listen", "127.0.0.1:0", "--http", "off", "--durability", "none")


FIRST = ("unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Makes a program process 1, as it is in a container."""
IN_CONTAINER = bool(shutil.which("unshare")) and subprocess.run([*FIRST, "true"], capture_output=True).returncode == 0
first = pytest.mark.skipif(not IN_CONTAINER, reason="namespaces of processes cannot be made here")


@contextlib.asynccontextmanager
async def server(
    *flags: str,
    before: str = "pass",
    where: tuple[str, ...] = (*HERE, "--instances", "2"),
    prefix: tuple[str, ...] = (),
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server process, with the scripted service in place of a model."""
    process = await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-c", PROGRAM.format(before=before), *where, *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_with(stream: asyncio.StreamReader | None, pattern: str) -> re.Match[str]:
    """The first line that matches; the process must not end before."""
    assert stream is not None
    lines = []
    while line := (await stream.readline()).decode():
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no line matches {pattern!r} in {lines}")


async def address_of(process: asyncio.subprocess.Process) -> str:
    return (await line_with(process.stderr, r"listening address=(\S+)"))[1]


async def first_token(client: AsyncSpotjaxClient, **fields: Any) -> tuple[Any, list[int]]:
    stream = client.generate("x", seed=1, **fields)
    return stream, list((await anext(stream)).tokens)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_where_it_serves_and_drains_on_a_signal(number: signal.Signals) -> None:
    async with server("--model", "m", "--retain-seconds", "0.02") as process:
        found = await line_with(process.stdout, r"^spotjax is serving m on (\S+) \(mesh 2x2x1 on 2 instances\)$")
        async with AsyncSpotjaxClient(found[1]) as client:
            stream, tokens = await first_token(client, max_tokens=16)
            process.send_signal(number)
            await line_with(process.stderr, "draining")
            assert not await client.ready()
            tokens += [token async for delta in stream for token in delta.tokens]
            assert len(tokens) == 16
        await line_with(process.stdout, "^closed$")
        assert await process.wait() == 0


def child_of(process: asyncio.subprocess.Process) -> int:
    """The process that ``unshare`` started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@first
async def test_as_the_first_process_of_a_container_it_drains_on_a_signal() -> None:
    async with server(prefix=FIRST) as process:
        await line_with(process.stdout, "^spotjax is serving tiny on")
        os.kill(child_of(process), signal.SIGTERM)
        await line_with(process.stdout, "^closed$")
        assert await process.wait() == 0


@first
async def test_as_the_first_process_of_a_container_it_ends_on_a_signal_before_it_serves(tmp_path: Path) -> None:
    os.mkfifo(config := tmp_path / "config.toml")
    async with server("--config", str(config), prefix=FIRST) as process:
        with await asyncio.to_thread(config.open, "w"):  # it has begun to read its settings
            os.kill(child_of(process), signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("where", [HERE, ("--workers", "2", *HERE)])
async def test_a_controller_serves_and_drains_like_an_embedded_server(where: tuple[str, ...]) -> None:
    async with server(where=where) as process:
        await line_with(process.stdout, "^a controller$")
        await line_with(process.stdout, "^spotjax is serving tiny on")
        process.send_signal(signal.SIGTERM)
        await line_with(process.stdout, "^closed$")
        assert await process.wait() == 0


async def test_a_worker_listens_nowhere_and_ends_as_its_process_says() -> None:
    async with server(where=("--join", "127.0.0.1:5")) as process:
        out, err = await process.communicate()
        assert (process.returncode, out, err) == (7, b"working for 127.0.0.1:5\n", b"")


async def test_data_that_workers_cannot_reach_is_warned_about() -> None:
    async with server(where=("--join", "10.0.0.1:5")) as process:
        await line_with(process.stderr, r"warning .*cannot reach data_listen \(127.0.0.1:0\)")
    async with server(where=("--join", "10.0.0.1:5", "--data-listen", "10.0.0.2:0", "--insecure")) as process:
        _, err = await process.communicate()
        assert b"data_listen (10.0.0.2:0) lets anybody read" in err and b"cannot reach" not in err


def test_a_controller_loads_no_jax() -> None:
    modules = ["cli", "serve", "local_workers", "settings", "async_client"]
    modules += ["fleet_server"] if importlib.util.find_spec("spotjax.fleet_server") else []
    program = f"import sys, {', '.join(f'spotjax.{name}' for name in modules)}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_over_http_it_drains_too_and_refuses_what_is_new() -> None:
    async with server("--http", "127.0.0.1:0", "--retain-seconds", "0.1") as process:
        address = (await line_with(process.stderr, r"serving HTTP address=(\S+)"))[1]
        await line_with(process.stdout, "serving tiny on")
        asked = {"prompt": "x", "max_tokens": 16, "stream": True}
        async with (
            httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as client,
            client.stream("POST", "/v1/completions", json=asked) as stream,
        ):
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("id: ")
            process.send_signal(signal.SIGTERM)
            await line_with(process.stderr, "draining")
            for refused in (await client.get("/ready"), await client.post("/v1/completions", json=asked)):
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert refused.json()["error"]["code"] == "draining"
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
        await line_with(process.stdout, "^closed$")
        assert await process.wait() == 0


async def test_a_taken_port_for_http_ends_the_start_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with server("--http", address) as process:
            _, problems = await process.communicate()
    assert process.returncode == 2
    assert f"cannot serve HTTP on {address}: Address already in use; give http another" in problems.decode()


async def test_draining_ends_after_its_time_with_0() -> None:
    async with server("--retain-seconds", "1000", "--drain-seconds", "0.1") as process:
        found = await line_with(process.stdout, r"serving tiny on (\S+)")
        async with AsyncSpotjaxClient(found[1], patience=0) as client:
            stream = asyncio.create_task(first_token(client))
            await line_with(process.stderr, "accepted")
            process.send_signal(signal.SIGTERM)
            await line_with(process.stderr, "requests were left unfinished")
            with pytest.raises(Unavailable):
                await stream
        assert await process.wait() == 0


async def test_a_server_that_is_alone_on_its_machine_drains_before_that_is_taken(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    flags = ("--retain-seconds", "1000", "--notices", "none", "--notice-file", str(notice))
    async with server(*flags) as process:
        found = await line_with(process.stdout, r"serving tiny on (\S+)")
        async with AsyncSpotjaxClient(found[1], patience=0) as client:
            stream = asyncio.create_task(first_token(client))
            await line_with(process.stderr, "accepted")
            notice.write_text("rebalance")
            await line_with(process.stderr, "rebalance")
            notice.write_text("preempt 2.5")
            await line_with(process.stderr, "draining")
            await line_with(process.stderr, "requests were left unfinished")
            with pytest.raises(Unavailable):
                await stream
        assert await process.wait() == 0


async def test_a_second_signal_stops_at_once() -> None:
    async with server("--retain-seconds", "1000") as process:
        found = await line_with(process.stdout, r"serving tiny on (\S+)")
        async with AsyncSpotjaxClient(found[1], patience=0) as client:
            stream = asyncio.create_task(first_token(client))
            await line_with(process.stderr, "accepted")
            process.send_signal(signal.SIGTERM)
            await line_with(process.stderr, "draining")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM
            with pytest.raises(Unavailable):
                await stream


async def test_while_the_model_loads_it_is_alive_not_ready_and_can_be_stopped() -> None:
    async with server(before="await asyncio.sleep(1000)") as process:
        async with AsyncSpotjaxClient(await address_of(process), patience=0) as client:
            assert not await client.ready()
            with pytest.raises(Exception, match="starting"):
                await first_token(client)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_model_that_cannot_be_loaded_is_one_clear_line() -> None:
    before = "from spotjax.errors import CheckpointError; raise CheckpointError('no model m')"
    async with server(before=before) as process:
        await line_with(process.stderr, "^spotjax: no model m$")
        assert await process.wait() == 1


async def test_wrong_settings_exit_with_2() -> None:
    async with server("--instances", "-1") as process:
        await line_with(process.stderr, "^spotjax: --instances: ")
        assert await process.wait() == 2


async def test_an_address_beyond_this_machine_needs_credentials_or_a_word_and_is_warned_about() -> None:
    async with server(where=EVERYWHERE) as process:
        await line_with(process.stderr, r"^spotjax: listen \(0.0.0.0:0\) lets anybody .*api_keys.*insecure")
        assert await process.wait() == 2
    async with server("--insecure", "--log-format", "json", where=EVERYWHERE) as process:
        found = await line_with(process.stderr, r"lets anybody send requests")
        assert '"level":"warning"' in found.string


async def test_a_failed_engine_ends_the_server_with_an_error() -> None:
    async with server(before="failure.set_exception(RuntimeError('the device is on fire'))") as process:
        _, err = await process.communicate()
        assert process.returncode == 1
        assert b"the device is on fire" in err
