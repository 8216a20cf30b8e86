"""What is measured of restarts, and what is noticed when a log does not say what clients saw."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from spotjax.engine.durable_log import DurableLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.tools.load import Load, Stream
from spotjax.tools.restarts import Restart, disagreements, restarts
from spotjax.tools.service import Life, Service


def test_an_outage_ends_with_the_first_token_of_whichever_life_brings_one() -> None:
    lives = [Life(0.0, 10.0), Life(11.0, 12.0), Life(13.0, 0.0, 5, 4)]
    streams = [Stream("a", 0.0, [9.0, 10.01, 16.0]), Stream("b", 0.0, [13.05, 15.0])]
    assert restarts(lives, streams) == [Restart(5.0, 2.0, 5, 4)]


def test_every_life_that_brings_tokens_ends_an_outage() -> None:
    lives = [Life(0.0, 10.0), Life(10.5, 20.0, 2, 2), Life(21.0)]
    assert restarts(lives, [Stream("a", 0.0, [12.0, 13.0, 24.0])]) == [
        Restart(2.0, 1.5, 2, 2),
        Restart(4.0, 3.0, None, 0),
    ]


def test_a_life_without_tokens_is_no_restart_yet() -> None:
    assert restarts([Life(0.0, 10.0), Life(11.0)], [Stream("a", 0.0, [9.0])]) == []


async def recorded(directory: Path, *lengths: tuple[str, int, bool]) -> Service:
    """A service that ended, with a log of requests: id, tokens, and whether they ended."""
    log = DurableLog.open(directory, "interval", "model")
    for key, (name, tokens, ended) in enumerate(lengths):
        request = GenerationRequest(name, (1, 2), SamplingParams(max_tokens=9))
        state = RequestState(name, 0, request.prompt, request.sampling)
        await log.accept(request, [state], key)
        new = tuple(range(tokens))
        state = replace(state, tokens=new, text="a" * tokens, text_ends=tuple(n + 1 for n in new), decoded=tokens)
        log.append([state.finished(FinishReason.LENGTH) if ended else state], lambda: None)
    await log.close()
    return cast(Service, SimpleNamespace(commit_log=directory))


def seen(**tokens: int) -> Load:
    """A load whose requests ended just now with so many tokens."""
    ended = {name: (time.monotonic(), (count,)) for name, count in tokens.items()}
    return cast(Load, SimpleNamespace(ended=ended, is_ours=lambda name: name.startswith("ours")))


async def test_a_log_that_says_what_clients_saw_is_right(tmp_path: Path) -> None:
    service = await recorded(tmp_path, ("ours_1", 3, True), ("ours_2", 1, True), ("other", 2, True))
    assert disagreements(service, seen(ours_1=3, ours_2=1)) == []


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"ours_1": 4, "ours_2": 1}, "the log has (3,) tokens of ours_1, clients saw (4,)"),
        ({"ours_1": 3}, "the log has ours_2, which did not end for its client"),
        ({"ours_1": 3, "ours_2": 1, "ours_3": 1}, "the log has nothing of ours_3"),
    ],
)
async def test_a_log_that_says_something_else_is_noticed(tmp_path: Path, tokens: dict[str, int], problem: str) -> None:
    service = await recorded(tmp_path, ("ours_1", 3, True), ("ours_2", 1, True))
    assert disagreements(service, seen(**tokens)) == [problem]


async def test_what_is_unfinished_in_the_end_is_noticed(tmp_path: Path) -> None:
    service = await recorded(tmp_path, ("other", 2, False))
    assert disagreements(service, seen()) == ["other is unfinished in the log"]
