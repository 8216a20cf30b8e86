"""The log that lives in memory: everything may be told at once, and nothing is there from before."""

from __future__ import annotations

from log_cases import new_request

from spotjax.engine.commit_log import CommitLog, MemoryCommitLog


async def test_what_is_recorded_in_memory_is_told_at_once_and_in_order() -> None:
    log, told = MemoryCommitLog(), []
    request = new_request("a", 2)
    await log.accept(request.request, request.states, request.key)
    for step in range(3):
        log.append(request.states, lambda step=step: told.append(step))
    assert told == [0, 1, 2]
    log.forget("a")
    await log.close()


async def test_a_log_in_memory_is_that_of_a_new_service_that_never_had_requests() -> None:
    log: CommitLog = MemoryCommitLog()
    assert (log.epoch, log.problem, list(log.replay())) == (0, "", [])
    log.begin_epoch(3)
    assert log.epoch == 3
    assert log.identity and log.identity != MemoryCommitLog().identity
