"""The first signal is a notice, whoever sends it; the second is no wish to wait."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from spotjax.fleet.notices.notice import Notice, NoticeKind
from spotjax.fleet.notices.signals import SAME_SECONDS, SignalSource


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_a_notice_and_the_next_one_is_the_end(number: signal.Signals) -> None:
    ended, clock = asyncio.Event(), [100.0]
    source = SignalSource("vm", lambda: clock[0], 25.0, again=ended.set)
    try:
        async with asyncio.timeout(10):
            os.kill(os.getpid(), number)
            assert await source.wait() == Notice("signal", NoticeKind.PREEMPT, "vm", 125.0, number.name)
            clock[0] += 2 * SAME_SECONDS
            assert not ended.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            await ended.wait()
    finally:
        await source.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_a_signal_that_comes_by_two_ways_is_one() -> None:
    again: list[float] = []
    loop = asyncio.get_running_loop()
    source = SignalSource("vm", lambda: 100.0, 25.0, again=lambda: again.append(loop.time()))
    try:
        async with asyncio.timeout(10):
            os.kill(os.getpid(), signal.SIGTERM)
            await source.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCONT)
            await asyncio.sleep(0.05)  # signals are handled by now
    finally:
        await source.close()
    assert again == []
