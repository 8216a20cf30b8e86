"""Several sources as one lose nothing of what any of them says."""

from __future__ import annotations

import asyncio

import pytest
from virtual_time import run

from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.several import Several


class Scripted:
    """Says something at every moment of a list, then nothing, or fails."""

    def __init__(self, name: str, delays: list[float], fails: bool = False) -> None:
        self.name, self._delays, self._fails = name, delays, fails
        self.closed = False

    async def wait(self) -> Notice | Withdrawn:
        if self._fails:
            raise RuntimeError("broken")
        if not self._delays:
            await asyncio.Event().wait()
        await asyncio.sleep(self._delays.pop(0))
        return Notice(self.name, NoticeKind.PREEMPT, "instance-0", None, "")

    async def close(self) -> None:
        self.closed = True


def test_everything_is_heard_also_after_waits_that_were_given_up() -> None:
    async def main() -> list[str]:
        sources = [Scripted("a", [1.0, 1.0, 5.0]), Scripted("b", [1.0]), Scripted("c", [])]
        both = Several("both", sources)
        heard = []
        while len(heard) < 4:
            try:
                async with asyncio.timeout(0.3):
                    heard.append((await both.wait()).source)
            except TimeoutError:
                continue
        await both.close()
        assert all(source.closed for source in sources)
        return heard

    assert sorted(run(main())) == ["a", "a", "a", "b"]


def test_a_source_that_breaks_is_not_passed_over() -> None:
    async def main() -> None:
        both = Several("both", [Scripted("a", []), Scripted("b", [], fails=True)])
        try:
            await both.wait()
        finally:
            await both.close()

    with pytest.raises(RuntimeError, match="broken"):
        run(main())
