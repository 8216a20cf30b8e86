"""What was accepted and committed can be read and replayed until it is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spotjax.engine.commit_log import MemoryCommitLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.errors import UnknownRequest


def accepted(log: MemoryCommitLog, name: str, n: int = 1) -> list[RequestState]:
    sampling = SamplingParams()
    states = [RequestState(name, choice, (1, 2), sampling) for choice in range(n)]
    log.accept(GenerationRequest(name, (1, 2), sampling, n), states)
    return states


def test_the_log_has_the_last_state_of_every_choice() -> None:
    log = MemoryCommitLog()
    first, second = accepted(log, "a", n=2)
    log.append([replace(second, tokens=(7,))])
    log.append([replace(first, tokens=(5,)), replace(second, tokens=(7, 8))])
    assert [state.tokens for state in log.states("a")] == [(5,), (7, 8)]
    assert "a" in log


def test_what_was_read_is_a_snapshot() -> None:
    log = MemoryCommitLog()
    (state,) = accepted(log, "a")
    before = log.states("a")
    log.append([replace(state, tokens=(5,))])
    assert before == (state,)


def test_replay_gives_everything_in_the_order_of_acceptance() -> None:
    log = MemoryCommitLog()
    for name in "cab":
        accepted(log, name)
    log.append([replace(log.states("a")[0], tokens=(5,))])
    log.forget("c")
    replayed = [(request.request_id, states[0].tokens) for request, states in log.replay()]
    assert replayed == [("a", (5,)), ("b", ())]


@pytest.mark.parametrize("known", [True, False])
def test_what_is_forgotten_or_never_was_is_unknown(known: bool) -> None:
    log = MemoryCommitLog()
    if known:
        accepted(log, "a")
    log.forget("a")
    assert "a" not in log
    with pytest.raises(UnknownRequest, match="'a' is not known"):
        log.states("a")
