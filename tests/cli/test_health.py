"""``spotjax health`` against live servers: what it asks whom, by the settings of the process that it is about."""

import asyncio
from pathlib import Path

import pytest
from certificates import certificates
from command_line import CommandLine

from spotjax import cli
from spotjax.api.server import ApiServer
from spotjax.transport.credentials import server_credentials


class Health:
    """Runs ``spotjax health`` on a thread."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    async def of(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        code = await asyncio.to_thread(cli.main, ["health", *arguments])
        return code, *self.capture.readouterr()


@pytest.fixture
def health(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Health:
    monkeypatch.delenv("SPOTJAX_NAME", raising=False)
    return Health(capsys)


async def test_a_server_is_well_while_it_takes_requests(command_line: CommandLine, health: Health) -> None:
    port = command_line.address.rpartition(":")[2]
    for listen in (command_line.address, f"0.0.0.0:{port}"):
        assert await health.of("--listen", listen) == (0, "ready\n", "")
    command_line.service.ready = False
    while (await health.of("--listen", command_line.address))[0] == 0:
        pass
    assert await health.of("--listen", command_line.address) == (1, "not ready\n", "")


async def test_a_server_is_alive_before_it_has_a_model(health: Health) -> None:
    server = ApiServer()
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    try:
        assert await health.of("--listen", address, "--alive") == (0, "not ready\n", "")
        assert await health.of("--listen", address) == (1, "not ready\n", "")
    finally:
        await server.stop()


async def test_nobody_who_answers_is_neither_well_nor_alive(health: Health) -> None:
    server = ApiServer()
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    await server.stop()
    for flags in ((), ("--alive",)):
        code, out, err = await health.of("--listen", address, *flags)
        assert (code, out) == (1, "")
        assert address in err


async def test_a_worker_is_well_while_its_controller_has_it_in_the_fleet(
    command_line: CommandLine, health: Health, tmp_path: Path
) -> None:
    settings = tmp_path / "worker.toml"
    settings.write_text(f'join = "{command_line.address}"\nname = "i-1"\n')
    assert await health.of("--config", str(settings)) == (0, "i-1 is ready\n", "")
    await command_line.service.preempt("i-1", 0)
    assert await health.of("--config", str(settings)) == (1, "i-1 is gone\n", "")
    assert await health.of("--config", str(settings), "--name", "i-7") == (1, "i-7 is unknown\n", "")


async def test_a_worker_without_a_name_is_asked_for_by_that_of_its_host(
    command_line: CommandLine, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "i-0")
    assert await health.of("--join", command_line.address) == (0, "i-0 is ready\n", "")


async def test_whether_a_worker_is_alive_is_refused(health: Health) -> None:
    code, _, err = await health.of("--join", "127.0.0.1:1", "--alive")
    assert code == 2 and "alive is for servers" in err


async def test_certificates_of_the_settings_are_shown(health: Health, tmp_path: Path) -> None:
    files = certificates(tmp_path)
    server = ApiServer(credentials=server_credentials(*files))
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    try:
        assert (await health.of("--listen", address, "--alive", *files.flags))[0] == 0
        assert (await health.of("--listen", address, "--alive"))[0] == 1
    finally:
        await server.stop()
