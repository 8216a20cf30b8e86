"""``spotjax generate`` and ``chat`` outlive their server: the output stays the same, standard error says what is up."""

import asyncio

import pytest
from command_line import CommandLine, until

from spotjax import cli
from spotjax.api import patience
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.testing.scripted_service import ByteTokenizer

MODEL = ServedModel("scripted", ByteTokenizer(), max_model_len=512)
GENERATE = ("generate", "hello", "--seed", "1", "--max-tokens", "6", "--request-id")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


async def start(command_line: CommandLine) -> None:
    """Starts another server on the port, which has nothing to serve yet."""
    await command_line.server.stop()
    command_line.server = ApiServer()
    await command_line.server.start(command_line.address)


async def test_generate_goes_on_where_a_dead_server_left_it(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, undisturbed, _ = await command_line.run(*GENERATE, "a")
    steps = asyncio.Semaphore(2)
    monkeypatch.setattr(command_line.service, "_delay", steps.acquire)
    running = asyncio.create_task(command_line.run(*GENERATE, "b"))
    printed = ""
    while len(printed) < 2:
        await asyncio.sleep(0.002)
        printed += command_line.capture.readouterr().out
    await start(command_line)
    await command_line.server.attach(command_line.service, MODEL)
    for _ in range(4):
        steps.release()
    code, out, err = await running
    assert (code, printed + out) == (0, undisturbed)
    assert err == "spotjax: connection lost; waiting for the server\nspotjax: resumed at token 2\n"


@pytest.mark.parametrize("command", [["generate", "hi", "--seed", "1"], ["chat", "hi", "--seed", "1"]])
async def test_a_server_that_is_starting_is_waited_for(command_line: CommandLine, command: list[str]) -> None:
    _, undisturbed, _ = await command_line.run(*command)
    await start(command_line)
    running = asyncio.create_task(command_line.run(*command))
    said = ""
    while "waiting" not in said:
        await asyncio.sleep(0.002)
        said += command_line.capture.readouterr().err
    await command_line.server.attach(command_line.service, MODEL)
    code, out, err = await running
    assert (code, out) == (0, undisturbed)
    reason = "the server is starting, its model is still being loaded"
    assert said + err == f"spotjax: waiting for the server: {reason}\nspotjax: the server is back\n"


async def test_without_patience_a_lost_connection_ends_the_command(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line.service, "_delay", asyncio.Semaphore(1).acquire)
    running = asyncio.create_task(command_line.run(*GENERATE, "r", "--patience", "0"))
    requests = command_line.service.requests
    await until(lambda: "r" in requests and requests["r"].committed == 1)
    await command_line.server.stop()
    code, _, err = await running
    assert code == 1 and err.startswith("spotjax: no Spotjax server answers at ")


async def test_patience_is_a_number_of_seconds(command_line: CommandLine) -> None:
    code, _, err = await command_line.run("generate", "x", "--patience", "-1")
    assert (code, err) == (2, "spotjax: patience must be 0 or more seconds, got -1\n")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_help_names_the_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"gives up at once (default: {patience.DEFAULT_PATIENCE:g})" in " ".join(capsys.readouterr().out.split())
