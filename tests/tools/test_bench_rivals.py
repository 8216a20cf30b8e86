"""The comparison of servers asks all of them the same, and notices what does not serve or answers otherwise."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import DONE, Answer, Seen, completion, scripted_server, usage

from spotjax.tools import bench_rivals, rival_servers
from spotjax.tools.bench_rivals import equal_answers, measure
from spotjax.tools.rival_servers import COMMANDS, Places, serving

MODELS = Answer([(0, b'{"data": [{"id": "m"}]}')], kind="application/json")
ANSWER = Answer([(0.01, completion("a")), (0.01, completion("b", "length")), (0, usage(3, 2)), (0, DONE)])
ARGUMENTS = argparse.Namespace(
    environments=Path("none"), weights=Path("none"), threads=1, rate=200.0, requests=4, concurrency=2, prompt=3, new=2,
    seed=5, clients=["spotjax"],
)  # fmt: skip


async def test_a_server_is_asked_the_same_in_every_load_and_warmed_up_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seen: Seen) -> Answer:
        return MODELS if seen.path == "/v1/models" else ANSWER

    async with scripted_server(answer) as server:

        @contextlib.contextmanager
        def there(name: str, places: Places) -> Iterator[str]:
            yield server.url

        monkeypatch.setattr(bench_rivals, "serving", there)
        rows = await asyncio.to_thread(measure, "llama.cpp", ARGUMENTS)
    assert [row["load"] for row in rows] == ["fixed 200/s", "poisson 200/s", "2 clients"]
    assert all(row["completed"] == 4 and row["server"] == "llama.cpp" for row in rows)
    prompts = [seen.body["prompt"] for seen in server.seen if seen.body]
    assert len(prompts) == 6 + 3 * 4 and sorted(prompts[6:10]) == sorted(prompts[10:14]) == sorted(prompts[14:])
    assert equal_answers(rows) == {"llama.cpp": 1.0}


def test_answers_are_compared_request_by_request() -> None:
    def row(server: str, *answers: str) -> dict[str, object]:
        return {"server": server, "load": "x", "requests": [{"answer": answer} for answer in answers]}

    assert equal_answers([row("a", "1", "2"), row("b", "1", "3"), {"server": "a", "load": "x"}]) == {"a": 1, "b": 0.5}


def test_a_server_that_ends_before_it_serves_is_reported_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = [sys.executable, "-c", "raise SystemExit('no such weights')"]
    monkeypatch.setitem(COMMANDS, "llama.cpp", lambda places: (dying, {}))  # type: ignore[arg-type]
    places = rival_servers.places(tmp_path, tmp_path, tmp_path, 1)
    with pytest.raises(RuntimeError, match="no such weights"), serving("llama.cpp", places):
        pass


@pytest.mark.parametrize("name", COMMANDS)
def test_every_server_is_told_weights_port_slots_and_threads_or_finds_them(name: str, tmp_path: Path) -> None:
    places = rival_servers.places(tmp_path, tmp_path / "weights", tmp_path, 2)
    command, _ = COMMANDS[name](places)
    words = " ".join(command)
    assert str(places.weights) in words and str(places.port) in words
    assert str(rival_servers.SLOTS) in command and str(rival_servers.CONTEXT) in command
