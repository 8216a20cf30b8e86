"""Every client command against a live server, for people and for machines."""

import asyncio
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import CommandLine, until

from spotjax import cli
from spotjax.api.requests import Sampling
from spotjax.commands.output import shown_bytes
from spotjax.engine.structure import Structure, StructureKind
from spotjax.fleet.status import FleetStatus
from spotjax.testing.scripted_generation import scripted_token
from spotjax.testing.scripted_service import ByteTokenizer


def text_of(prompt: str, count: int, seed: int, choice: int = 0, bos: bool = True) -> str:
    tokens = ByteTokenizer().encode(prompt, add_special_tokens=bos)
    return bytes(scripted_token(tokens, seed, choice, position) for position in range(count)).decode()


async def test_generate_prints_the_text(command_line: CommandLine) -> None:
    code, out, err = await command_line.run("generate", "hello", "--max-tokens", "64", "--seed", "1")
    assert (code, out, err) == (0, text_of("hello", 64, 1) + "\n", "")


async def test_generate_prints_deltas_as_json_lines(command_line: CommandLine) -> None:
    code, out, _ = await command_line.run("generate", "hello", "--seed", "1", "--logprobs", "1", "--json")
    deltas = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "".join(delta["text"] for delta in deltas) == text_of("hello", 16, 1)
    assert deltas[-1]["finish"] == "length"
    assert deltas[-1]["usage"] == {"prompt_tokens": 6, "completion_tokens": 16}
    assert deltas[0]["logprobs"][0] == {"logprob": -1.0, "top": [{"token": 0, "logprob": -1.0}]}


async def test_generate_prints_several_choices_apart(command_line: CommandLine) -> None:
    _, out, _ = await command_line.run("generate", "hello", "-n", "2", "--seed", "1")
    assert out == "".join(f"--- choice {c}\n{text_of('hello', 16, 1, c)}\n" for c in range(2))


async def test_generate_reads_standard_input(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    _, out, _ = await command_line.run("generate", "-", "--seed", "1")
    assert out == text_of("from a pipe", 16, 1) + "\n"


async def test_every_sampling_field_has_a_flag_that_reaches_the_engine(command_line: CommandLine) -> None:
    given = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 9,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logprobs": 2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    flags += ["--logit-bias", "5=-1.5", "--logit-bias", "6=2", "--stop", "x y", "--stop", "z", "--stop-token-ids", "7"]
    await command_line.run("generate", "x", "--json", "--ignore-eos", "--request-id", "r", *flags)
    sampling = command_line.service.requests["r"].request.sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.logit_bias, sampling.stop) == ({5: -1.5, 6: 2.0}, ("x y", "z"))
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((7,), True)
    assert set(Sampling.__annotations__) == {*given, "logit_bias", "stop", "stop_token_ids", "ignore_eos", "structure"}


async def test_resumable_is_on_unless_switched_off(command_line: CommandLine) -> None:
    await command_line.run("generate", "x", "--request-id", "a")
    await command_line.run("generate", "x", "--request-id", "b", "--no-resumable")
    assert [command_line.service.requests[r].request.resumable for r in "ab"] == [True, False]


async def test_chat_answers_one_message(command_line: CommandLine) -> None:
    _, out, _ = await command_line.run("chat", "hi", "--system", "be", "--seed", "1", "--max-tokens", "5")
    assert out == text_of("system: be\nuser: hi\nassistant: ", 5, 1, bos=False) + "\n"


async def test_chat_remembers_the_conversation(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nand?\n"))
    _, out, _ = await command_line.run("chat", "--seed", "1", "--max-tokens", "5")
    first = text_of("user: hi\nassistant: ", 5, 1, bos=False)
    second = text_of(f"user: hi\nassistant: {first}\nuser: and?\nassistant: ", 5, 1, bos=False)
    assert out == f"{first}\n{second}\n"


async def test_chat_leaves_room_for_the_conversation(command_line: CommandLine) -> None:
    await command_line.run("chat", "hi")
    (taken,) = command_line.service.requests.values()
    assert taken.request.sampling.max_tokens == 256


async def test_status_shows_instances_mesh_and_requests(command_line: CommandLine) -> None:
    code, out, _ = await command_line.run("status")
    assert code == 0
    for shown in ("scripted", "i-0", "i-1", "mesh 2x2x1", "stage 1", "layers 2-3", "i-1/1", "0 running", "0/64"):
        assert shown in out


async def test_status_as_json_has_the_placement(command_line: CommandLine) -> None:
    _, out, _ = await command_line.run("status", "--json")
    status = json.loads(out)
    assert (status["model"], status["ready"], status["placement"]["shape"]) == ("scripted", True, "2x2x1")
    assert status["placement"]["devices"][3] == {"position": [1, 1, 0], "instance": "i-1", "index": 1}
    assert status["instances"][0]["positions"] == {"0": [0, 0, 0], "1": [0, 1, 0]}


async def test_status_without_a_mesh_says_so(command_line: CommandLine) -> None:
    await command_line.service.preempt("i-0", 0)
    await command_line.service.preempt("i-1", 0)
    _, out, _ = await command_line.run("status")
    assert "no mesh" in out and "gone" in out


@pytest.mark.parametrize("form", [[], ["--json"]])
async def test_status_watch_keeps_showing_until_the_server_is_gone(
    command_line: CommandLine, form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain_status = command_line.service.status

    def status() -> FleetStatus:
        seen.append(command_line.service.ready)
        return plain_status()

    monkeypatch.setattr(command_line.service, "status", status)
    watching = asyncio.create_task(command_line.run("status", "--watch", "--interval", "0.01", *form))
    await until(lambda: seen.count(True) > 5)
    command_line.service.ready = False
    await until(lambda: seen.count(False) > 5)
    await command_line.server.stop()
    code, out, err = await watching
    assert code == 1 and "no Spotjax server answers" in err
    assert ("not ready" if not form else '"ready":false') in out


async def test_preempt_and_add_print_what_the_change_did(command_line: CommandLine) -> None:
    code, out, _ = await command_line.run("preempt", "i-1", "--grace", "5")
    assert code == 0 and out.startswith("i-1 is gone\nmesh 2x2x1 -> 1x2x1, epoch 2\n")
    assert "1 MiB stayed in place, 512 KiB moved, 0 B loaded" in out and "paused for 0.250 s" in out
    code, out, _ = await command_line.run("add")
    assert code == 0 and out.startswith("1 instance joined\nmesh 1x2x1 -> 2x2x1, epoch 3\n")
    code, out, _ = await command_line.run("preempt", "i-0", "--json")
    assert json.loads(out)["before"]["shape"] == "2x2x1"


async def test_drain_prints_what_the_change_did(command_line: CommandLine) -> None:
    code, out, _ = await command_line.run("drain", "i-1")
    assert code == 0 and out.startswith("i-1 has left\nmesh 2x2x1 -> 1x2x1, epoch 2\n")
    code, out, err = await command_line.run("drain", "i-0", "--json")
    assert (code, out, err) == (1, "", "spotjax: no mesh fits without i-0\n")
    await command_line.run("add")
    _, out, _ = await command_line.run("drain", "i-0", "--json")
    assert json.loads(out)["after"]["shape"] == "1x2x1"


async def test_status_says_where_machines_are_if_it_knows(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = await command_line.run("status")
    assert "zone" not in out and "price" not in out
    status = command_line.service.status()
    machine = replace(status.instances[0], zone="zone-a", price_class="on_demand", address="h:9")
    status = replace(status, instances=(machine, *status.instances[1:]))
    monkeypatch.setattr(command_line.service, "status", lambda: status)
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = await command_line.run("status")
    assert all(shown in out for shown in ("zone-a", "on-demand", "spot", "h:9"))
    _, out, _ = await command_line.run("status", "--json")
    shown = json.loads(out)["instances"][0]
    assert (shown["zone"], shown["price_class"], shown["address"]) == ("zone-a", "on_demand", "h:9")


async def test_recent_events_are_shown_and_that_is_all(command_line: CommandLine) -> None:
    await command_line.service.preempt("i-0", 0)
    code, out, _ = await command_line.run("events")
    assert code == 0 and [line.split(maxsplit=1)[1] for line in out.splitlines()] == [
        "epoch 1 ready: serving on 2x2x1",
        "epoch 1 lost i-0: i-0 is gone",
        "epoch 2 switch: epoch 2",
    ]


@pytest.mark.parametrize("form", [[], ["--json"]])
async def test_events_are_followed_until_the_server_stops(command_line: CommandLine, form: list[str]) -> None:
    await command_line.service.preempt("i-0", 0)
    await command_line.service.stop()
    code, out, _ = await command_line.run("events", "--follow", *form)
    assert code == 0 and len(out.splitlines()) == 3
    if form:
        assert [json.loads(line)["kind"] for line in out.splitlines()] == ["ready", "lost", "switch"]
    else:
        assert "epoch 1 lost i-0: i-0 is gone" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--top-p", "2"], "sampling.top_p: must be in (0, 1], got 2"),
        (["generate", "x", "--model", "gpt"], "this server serves 'scripted'"),
        (["preempt", "i-9"], "no instance 'i-9' is alive; there are i-0, i-1"),
        (["drain", "i-9"], "no instance 'i-9' is alive; there are i-0, i-1"),
        (["add", "7"], "7 instances were asked for"),
        (["add", "99999999999"], "count: Value out of range"),
        (["generate", "x", "-n", "99999999999"], "n: Value out of range"),
        (["generate", "x", "--logit-bias=-1=3"], "sampling.logit_bias: "),
    ],
)
async def test_an_error_is_one_clear_line(command_line: CommandLine, arguments: list[str], said: str) -> None:
    code, out, err = await command_line.run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("spotjax: ") and said in err


@pytest.mark.parametrize(
    "command", [["generate", "x"], ["chat", "x"], ["status"], ["events"], ["preempt", "i"], ["drain", "i"], ["add"]]
)
async def test_no_server_is_said_with_how_to_start_one(command_line: CommandLine, command: list[str]) -> None:
    await command_line.server.stop()
    code, _, err = await command_line.run(*command)
    assert code == 1
    address = command_line.address
    start = f"spotjax serve --instances 4 --listen {address}"
    assert err == f"spotjax: no Spotjax server answers at {address}; start one with: {start}\n"


async def test_ctrl_c_exits_130_quietly_and_ends_the_request(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = print

    def interrupted(*values: object, **options: object) -> None:
        printed(*values, **options)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    forever = asyncio.Semaphore(3)
    monkeypatch.setattr(command_line.service, "_delay", forever.acquire)
    monkeypatch.setattr("builtins.print", interrupted)
    code, out, err = await command_line.run("generate", "x", "--request-id", "r", "--seed", "1")
    assert (code, err) == (130, "") and out
    assert command_line.service.requests["r"].ended == "cancelled"


async def test_a_request_that_ends_early_says_why(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.service, "_delay", asyncio.Semaphore(3).acquire)
    running = asyncio.create_task(command_line.run("generate", "x", "--request-id", "r"))
    requests = command_line.service.requests
    await until(lambda: "r" in requests and requests["r"].committed == 3)
    command_line.service.cancel("r")
    _, _, err = await running
    assert err == "spotjax: the request ended early: cancelled\n"


def test_fetch_says_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    catalog = pytest.importorskip("spotjax.models.catalog")
    told = []

    def fetch(name: str, progress: object) -> Path:
        assert callable(progress)
        progress("downloading")
        told.append(name)
        return tmp_path / "model.gguf"

    monkeypatch.setattr(catalog, "fetch", fetch)
    assert cli.main(["fetch", "smollm2-135m-instruct"]) == 0
    assert capsys.readouterr().out == f"smollm2-135m-instruct is at {tmp_path / 'model.gguf'}\n"
    assert cli.main(["fetch", "smollm2-135m-instruct", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "model.gguf")
    assert told == ["smollm2-135m-instruct"] * 2


def test_fetching_an_unknown_model_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "gpt-9"]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["generate"], ["generate", "x", "--top-k", "many"], ["generate", "x", "--logit-bias", "x"], ["nonsense"]],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and "usage: spotjax" in capsys.readouterr().err


def test_logprobs_in_text_output_are_refused_not_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--logprobs", "1"]) == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["serve", "generate", "chat", "status", "events", "preempt", "drain", "add", "fetch"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and f"usage: spotjax {command}" in capsys.readouterr().out


def test_bytes_are_shown_in_the_unit_that_fits() -> None:
    assert [shown_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 1 << 41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5 MiB",
        "3 GiB",
        "2 TiB",
    ]


async def test_output_can_be_asked_for_in_every_structure(command_line: CommandLine, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "x"')
    flags = {
        "s": ("--json-schema", str(schema)),
        "o": ("--json-object",),
        "r": ("--regex", "[0-9]+"),
        "g": ("--grammar", str(grammar)),
    }
    for request_id, given in flags.items():
        code, _, err = await command_line.run("generate", "x", "--request-id", request_id, *given)
        assert code == 0, err
    assert {name: command_line.service.requests[name].request.sampling.structure for name in flags} == {
        "s": Structure(StructureKind.JSON_SCHEMA, '{"type": "null"}'),
        "o": Structure(StructureKind.JSON_OBJECT),
        "r": Structure(StructureKind.REGEX, "[0-9]+"),
        "g": Structure(StructureKind.GRAMMAR, 'start: "x"'),
    }


async def test_a_structure_that_cannot_be_asked_for_is_refused_in_words(command_line: CommandLine) -> None:
    code, _, err = await command_line.run("generate", "x", "--regex", "no")
    assert code and "sampling.structure.regex: refused as scripted" in err
    unread, two = ("--grammar", "/nowhere"), ("--json-object", "--regex", "a")
    for flags, problem in ((unread, "cannot be read"), (two, "not allowed")):
        with pytest.raises(SystemExit):
            await command_line.run("generate", "x", *flags)
        assert problem in command_line.capture.readouterr().err
