"""``spotjax bench``: what it asks, shows and writes, how it ends, and which arguments it refuses before it asks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from openai_server import DONE, Answer, Seen, completion, scripted_server, usage

from spotjax import cli

ANSWER = Answer([(0.01, completion("a")), (0.01, completion("b", "length")), (0, usage(8, 2)), (0, DONE)])
MODELS = Answer([(0, b'{"data": [{"id": "served"}]}')], kind="application/json")
SMALL = ("--requests", "6", "--prompt-tokens", "8", "--output-tokens", "2", "--warm-up", "1")


def answer(seen: Seen) -> Answer:
    return MODELS if seen.path == "/v1/models" else ANSWER


async def bench(url: str, *arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ["bench", "--server", url, *SMALL, *arguments])


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


async def test_a_run_shows_its_figures_and_writes_them_with_what_they_depend_on(capsys: Any, tmp_path: Path) -> None:
    path, key = tmp_path / "a.json", "secret-key-of-mine"
    async with scripted_server(answer) as server:
        code = await bench(
            server.url, "--arrivals", "fixed", "--rate", "100", "--json", str(path), "--json-requests",
            "--goodput", "e2el:60000", "--api-key", key,
        )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0 and "6 requests completed, 0 failed" in shown.out and "time to first token" in shown.out
    assert len(server.seen) == 1 + 1 + 6 and {seen.body["model"] for seen in server.seen[1:]} == {"served"}
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {key}"}
    found = read(path)
    (run,) = found["runs"]
    assert found["settings"]["model"] == "served" and found["settings"]["seed"] == 0 and not found["interrupted"]
    assert found["machine"]["cores"] and found["versions"]["spotjax"] and key not in path.read_text()
    assert (run["completed"], run["failed"], run["total_output_tokens"], run["total_input_tokens"]) == (6, 0, 12, 48)
    assert run["request_rate"] == 100 and run["request_goodput"] == run["request_throughput"]
    assert 10 <= run["median_ttft_ms"] < run["median_e2el_ms"] and run["p99_tpot_ms"] >= 10
    prompts = {seen.body["prompt"] for seen in server.seen[1:]}
    assert len(prompts) == 7 and not any(prompt in path.read_text() for prompt in prompts)
    assert all(r["sent"] >= r["arrival"] - 1e-5 for r in run["requests"])
    assert len({r["answer"] for r in run["requests"]}) == 1 and run["requests"][0]["output_tokens"] == 2


async def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTJAX_API_KEY", "sj-environment")
    async with scripted_server(answer) as server:
        assert await bench(server.url) == 0
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer sj-environment"}


async def test_a_sweep_has_a_line_and_a_run_for_each_point_and_a_picture(capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "a.json", tmp_path / "a.png"
    async with scripted_server(answer) as server:
        code = await bench(server.url, "--concurrency", "1,3", "--json", str(path), "--plot", str(picture))
    shown = capsys.readouterr().out
    assert code == 0 and "all, 1 at a time" in shown and "all, 3 at a time" in shown
    runs = read(path)["runs"]
    assert [run["max_concurrency"] for run in runs] == [1, 3] == [run["most_in_flight"] for run in runs]
    assert picture.read_bytes().startswith(b"\x89PNG") and "requests" not in runs[0]
    asked = [seen.body["prompt"] for seen in server.seen[1:]]
    assert len(set(asked)) == 1 + 2 * 6  # both points warm up with the same request, and measure with others


async def test_requests_that_fail_are_named_and_end_it_with_1(capsys: Any, tmp_path: Path) -> None:
    def every_third(seen: Seen) -> Answer:
        return Answer([(0, b"slow down")], 429, "text/plain") if len(server.seen) % 3 == 0 else ANSWER

    async with scripted_server(every_third) as server:
        code = await bench(server.url, "--model", "m", "--warm-up", "0", "--json", str(tmp_path / "a.json"))
    shown = capsys.readouterr()
    assert code == 1 and "4 requests completed, 2 failed" in shown.out and "such as: slow down" in shown.err
    assert read(tmp_path / "a.json")["runs"][0]["failures"] == {"http 429": 2}


async def test_without_a_server_there_is_an_error_and_no_figures(capsys: Any) -> None:
    async with scripted_server(answer) as server:
        pass
    for more in ((), ("--model", "m")):
        assert await bench(server.url, *more) == 1
        shown = capsys.readouterr()
        assert "connection refused" in shown.err and not shown.out


async def test_our_own_server_is_measured_over_grpc(command_line: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code, shown, _ = await command_line.run(
        "bench", "--api", "grpc", *SMALL, "--prompt-kind", "ids", "--arrivals", "gamma", "--burstiness", "0.5",
        "--rate", "200", "--ignore-eos", "--json", str(path),
    )  # fmt: skip
    assert code == 0 and "6 requests completed" in shown
    (run,) = read(path)["runs"]
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (48, 12)


async def test_a_trace_is_replayed_with_its_times_and_lengths(tmp_path: Path) -> None:
    trace, path = tmp_path / "t.csv", tmp_path / "a.json"
    trace.write_text("seconds,prompt,output\n1,700,9\n1.1,20,300\n1.3,20,9\n90,20,9\n")
    async with scripted_server(answer) as server:
        code = await asyncio.to_thread(
            cli.main,
            ["bench", "--server", server.url, "--warm-up", "0", "--trace", str(trace), "--trace-window", "0:5",
             "--max-prompt", "30", "--max-output", "8", "--json", str(path), "--json-requests"],
        )  # fmt: skip
    assert code == 0
    requests = read(path)["runs"][0]["requests"]
    assert [r["arrival"] for r in requests] == pytest.approx([0, 0.1, 0.3])
    assert [(r["prompt_tokens_planned"], r["output_tokens_asked"]) for r in requests] == [(30, 8), (20, 8), (20, 8)]


INTERRUPTIBLE = (
    "import signal; from spotjax.cli import main; "
    "signal.signal(signal.SIGINT, signal.default_int_handler); raise SystemExit(main())"
)
"""The command, also where whoever runs the tests ignores SIGINT, as a shell's background jobs do."""


async def test_ctrl_c_gives_what_there_is_so_far(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    slow = Answer([(0.01, completion("a")), (600, completion("b"))])
    async with scripted_server(lambda seen: slow if len(server.seen) > 2 else ANSWER) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", INTERRUPTIBLE, "bench", "--server", server.url, "--model", "m", *SMALL,
            "--warm-up", "0", "--concurrency", "2", "--json", str(path),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ),
        )  # fmt: skip
        while len(server.seen) < 4:  # which come when the first two have ended
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130, err.decode()
    assert "2 requests completed, 0 failed, 4 cut off" in out.decode() and "interrupted" in err.decode()
    assert read(path)["interrupted"] and read(path)["runs"][0]["completed"] == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--arrivals", "poisson"), "needs --rate"),
        (("--arrivals", "trace"), "needs --trace"),
        (("--rate", "1,2", "--concurrency", "1,2"), "sweep one"),
        (("--concurrency", "0"), "--concurrency"),
        (("--requests", "0"), "--requests"),
        (("--prompt-tokens", "normal:mean=4"), "--prompt-tokens"),
        (("--prompt-kind", "text"), "needs --tokenizer"),
        (("--prompt-kind", "ids", "--model", "m"), "--vocabulary"),
        (("--prompt-kind", "ids", "--api", "chat", "--model", "m"), "a chat is text"),
        (("--vocabulary", "9"), "--prompt-kind ids"),
        (("--prompts", "/nowhere"), "/nowhere"),
        (("--max-prompt", "5"), "are for --trace"),
        (("--trace", "/nowhere"), "/nowhere"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("--extra-body", "[]"), "--extra-body"),
        (("--goodput", "itl:5"), "--goodput"),
        (("--percentiles", "101"), "--percentiles"),
        (("--json", "/nowhere/a.json"), "/nowhere"),
        (("--json-requests",), "needs --json"),
        (("--timeout", "0"), "--timeout"),
        (("--tls-certificate", "a.pem"), "go together"),
        (("--server", "127.0.0.1:8471"), "expected a URL"),
        (("--api", "grpc", "--extra-body", "{}", "--server", "127.0.0.1:1"), "is for HTTP"),
        (("--arrivals", "all", "--rate", "2"), "no meaning"),
    ],
)
def test_arguments_of_no_meaning_are_refused_before_anything_is_asked(
    capsys: Any, arguments: tuple[str, ...], problem: str
) -> None:
    assert cli.main(["bench", "--server", "http://127.0.0.1:1", *arguments]) == 2
    assert problem in capsys.readouterr().err
