"""All sources are listened to at once, and none that fails takes anything with it."""

from __future__ import annotations

import asyncio

import pytest

from spotjax.fleet.notices.listen import Listener, shortened
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.standing import Word


class Scripted:
    """Says what it is given, and raises what it is given."""

    def __init__(self, name: str) -> None:
        self.name, self.script, self.closed = name, asyncio.Queue[Word | Exception](), False
        self.closing: Exception | None = None

    async def wait(self) -> Notice | Withdrawn:
        word = await self.script.get()
        if isinstance(word, Exception):
            raise word
        return word

    async def close(self) -> None:
        self.closed = True
        if self.closing is not None:
            raise self.closing


def word(source: str, evidence: str = "") -> Notice:
    return Notice(source, NoticeKind.PREEMPT, "vm", 1.0, evidence)


async def test_words_of_all_sources_arrive_also_of_one_that_is_added_later_and_of_one_that_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = asyncio.Queue[Word]()
    listener, first, second = Listener(heard.put_nowait, restart_seconds=0.0), Scripted("first"), Scripted("second")
    listener.add([first])
    first.script.put_nowait(KeyError("a bug"))
    first.script.put_nowait(word("first"))
    async with asyncio.timeout(10):
        assert await heard.get() == word("first")
        listener.add([second])
        second.script.put_nowait(word("second"))
        assert await heard.get() == word("second")
        first.script.put_nowait(Withdrawn("first", "vm", ""))
        assert await heard.get() == Withdrawn("first", "vm", "")
    assert "the source first failed" in caplog.text and "a bug" in caplog.text
    second.closing = OSError("it is stuck")
    await listener.close()
    assert first.closed and second.closed and "does not end in order" in caplog.text


async def test_a_listener_who_fails_is_told_the_next_word_nevertheless(caplog: pytest.LogCaptureFixture) -> None:
    heard = asyncio.Queue[Word]()

    def hear(word: Word) -> None:
        if word.evidence == "bad":
            raise ValueError("no")
        heard.put_nowait(word)

    source = Scripted("source")
    listener = Listener(hear, restart_seconds=0.0)
    listener.add([source])
    source.script.put_nowait(word("source", "bad"))
    source.script.put_nowait(word("source", "good"))
    async with asyncio.timeout(10):
        assert await heard.get() == word("source", "good")
    await listener.close()


def test_evidence_is_one_line_of_bounded_length() -> None:
    assert shortened("a\n b\t c") == "a b c"
    assert len(shortened("x" * 1000)) == 200
