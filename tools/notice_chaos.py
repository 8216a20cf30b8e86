"""Notice sources on stand-ins of their platforms while all goes wrong on the way, and whether they told the truth.

A site is one machine on one platform: what is announced there, and from when on, is its record. ``play`` lets things be
announced and faults happen; ``judge`` compares what the source said with the record. Clocks and connections are passed
in, so that tests do this in virtual time and ``tools.chaos_notices`` over real HTTP.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from spotjax.fleet.notices.notice import Notice, NoticeKind, NoticeSource, Withdrawn
from spotjax.testing.metadata_faults import Fault, Kind, Request
from spotjax.tools.notice_sites import INTERVAL_SECONDS, Site, Stated, Told

PATIENCE_SECONDS = 12.0
"""After the end of a fault within which a source must have asked again: its longest wait for an answer, its longest
pause, and some for a busy machine."""
QUIET_SECONDS = 75.0
"""At the end of a play, without faults: for what is believed only after several answers."""
BOOT_SECONDS = 8.0
"""Before anything is announced."""
STATUSES = (401, 403, 404, 410, 429, 429, 500, 502, 503)
LOOK_SECONDS = 0.2
RECORD_SECONDS = 1.0
"""By which the record may be late with what begins by itself, since it is looked at only so often."""


@dataclass(frozen=True)
class Spell:
    """A fault that lasts.

    Attributes:
      begin, end: seconds from the beginning of the play.
      fault: that every answer has meanwhile.
      path: part of the paths that it concerns; all if empty.
    """

    begin: float
    end: float
    fault: Fault
    path: str


def draw_spells(draw: random.Random, count: int, seconds: float, paths: Sequence[str]) -> list[Spell]:
    """Faults of all kinds, short and long, that begin within so many seconds."""
    spells = []
    for _ in range(count):
        kind = draw.choice(list(Kind))
        long = draw.random() < 0.3
        begin = draw.uniform(0.0, seconds)
        fault = Fault(
            kind,
            seconds=draw.uniform(0.5, 6.0) if kind is Kind.SLOW else 60.0,
            status=draw.choice(STATUSES),
            retry_after=draw.choice([None, 1, 5, 120]),
        )
        length = draw.uniform(3.0, 8.0) if long else draw.uniform(0.2, 3.0)
        spells.append(Spell(begin, begin + length, fault, draw.choice(["", "", *paths])))
    return sorted(spells, key=lambda spell: spell.begin)


@dataclass
class Play:
    """What happened, in seconds from the beginning.

    Attributes:
      site: with its record.
      spells: of faults.
      heard: what the source said.
      spoilt: answers that a fault met.
    """

    site: Site
    spells: Sequence[Spell]
    heard: list[tuple[float, Notice | Withdrawn]] = field(default_factory=list)
    spoilt: int = 0

    def fault(self, now: float, request: Request) -> Fault | None:
        """What goes wrong with a request."""
        for spell in self.spells:
            if spell.begin <= now < spell.end and spell.path in request.path:
                self.spoilt += 1
                return spell.fault
        return None


async def play(
    play: Play, source: NoticeSource, clock: Callable[[], float], begun: float, moves: Sequence[tuple[float, str]],
    seconds: float,
) -> None:  # fmt: skip
    """Lets things be announced in their time, and listens.

    Args:
      play: is added to.
      source: of the site.
      clock: monotonic seconds.
      begun: on that clock.
      moves: when each of the site's moves is made, after the machine has booted.
      seconds: how long faults go on; it is listened for ``QUIET_SECONDS`` more.
    """
    hearing = asyncio.create_task(_hear(play, source, clock, begun))
    left = sorted((BOOT_SECONDS + moment, move) for moment, move in moves)
    try:
        while (now := clock() - begun) < seconds + QUIET_SECONDS:
            while left and left[0][0] <= now:
                play.site.move(left.pop(0)[1])
            play.site.look(now)
            await asyncio.sleep(LOOK_SECONDS)
            if hearing.done():
                hearing.result()
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await source.close()


async def _hear(play: Play, source: NoticeSource, clock: Callable[[], float], begun: float) -> None:
    while True:
        word = await source.wait()
        if isinstance(word, Notice) and word.deadline is not None:
            word = Notice(word.source, word.kind, word.instance, word.deadline - begun, word.evidence)
        play.heard.append((clock() - begun, word))


@dataclass
class Verdict:
    """What came of plays.

    Attributes:
      plays, faults, spoilt: how many there were; ``spoilt`` counts the answers that faults met.
      told: notices and withdrawals that a source had to pass on.
      overtaken: those that something newer replaced before there was a time without faults.
      problems: false, missed and late words.
      calm: seconds from the announcement to the word where nothing went wrong, of what is urgent.
      after: the same from the end of the last fault before the word, where something did.
      early, late: by how many seconds deadlines were wrong at most.
    """

    plays: int = 0
    faults: int = 0
    spoilt: int = 0
    told: int = 0
    overtaken: int = 0
    problems: list[str] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    early: float = 0.0
    late: float = 0.0

    def add(self, other: Verdict) -> None:
        """Puts another one's into this one."""
        for name in ("plays", "faults", "spoilt", "told", "overtaken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems
        self.calm += other.calm
        self.after += other.after
        self.early, self.late = max(self.early, other.early), max(self.late, other.late)


def judge(play: Play) -> Verdict:
    """Compares what was said with what was so."""
    verdict = Verdict(plays=1, faults=len(play.spells), spoilt=play.spoilt)
    for moment, word in play.heard:
        if not _true(play, moment, word, verdict):
            verdict.problems.append(f"false at {moment:.2f}: {word}")
    for index, told in enumerate(play.site.record):
        later = (each.at for each in play.site.record[index + 1 :] if each.source == told.source)
        _heard(play, told, next(later, inf), verdict)
    for source in play.site.sources:
        said = [word for _, word in play.heard if word.source == source]
        if not _same(said[-1] if said else None, play.site.now(source)):
            verdict.problems.append(f"at last {source} says {said[-1:]}, and {play.site.now(source)} is so")
    return verdict


def _same(word: Notice | Withdrawn | None, stated: Stated | None) -> bool:
    return (word.kind if isinstance(word, Notice) else None) == (stated.kind if stated is not None else None)


def _true(play: Play, moment: float, word: Notice | Withdrawn, verdict: Verdict) -> bool:
    """Whether that was so, lately, or an answer from before it changed came."""
    told = [each for each in play.site.record if each.source == word.source and each.at - RECORD_SECONDS <= moment]
    stale = any(
        spell.fault.kind is Kind.STALE and spell.begin <= moment < spell.end + PATIENCE_SECONDS for spell in play.spells
    )
    for index, each in enumerate(told):
        ended = told[index + 1].at if index + 1 < len(told) else inf
        if ended < moment - PATIENCE_SECONDS and not stale:
            continue
        if _same(word, each.said) and (each.said is None or _deadline_right(play, moment, word, each.said, verdict)):
            return True
    return False


def _deadline_right(
    play: Play, moment: float, word: Notice | Withdrawn, stated: Stated, verdict: Verdict | None = None
) -> bool:
    """Whether the deadline is right within what clocks can tell; the error is noted."""
    assert isinstance(word, Notice)
    ends = stated.ends if stated.after is None else moment + stated.after
    if word.kind is NoticeKind.REBALANCE or word.deadline is None:
        return ends is None or word.kind is NoticeKind.REBALANCE or ends <= moment + 2.0
    if ends is None:
        return False
    error = word.deadline - ends
    if not -play.site.early_seconds <= error <= play.site.late_seconds:
        return False
    if verdict is not None:
        verdict.early, verdict.late = max(verdict.early, -error), max(verdict.late, error)
    return True


def _heard(play: Play, told: Told, until: float, verdict: Verdict) -> None:
    """Whether what was announced was said, in time."""
    bound = PATIENCE_SECONDS + play.site.lag(told.source, told.said is None)
    clear = _clear(play.spells, told.at, bound)
    moments = (
        moment
        for moment, word in play.heard
        if word.source == told.source
        and moment >= told.at - RECORD_SECONDS and _same(word, told.said)
        and (told.said is None or _deadline_right(play, moment, word, told.said))
    )  # fmt: skip
    moment = next(moments, inf)
    if told.said is None and moment > clear + bound:
        said = [word for when, word in play.heard if word.source == told.source and when <= clear + bound]
        if not said or isinstance(said[-1], Withdrawn):
            return  # nor was it ever heard what ends here
    if moment > until and clear + bound > until:
        verdict.overtaken += 1
        return
    verdict.told += 1
    if moment > clear + bound:
        verdict.problems.append(f"missed until {moment:.2f}, could be asked for from {clear:.2f}: {told}")
        return
    ends = [spell.end for spell in play.spells if spell.end > told.at - PATIENCE_SECONDS and spell.begin < moment]
    if play.site.lag(told.source, told.said is None) > INTERVAL_SECONDS:
        return
    if ends:
        verdict.after.append(max(0.0, moment - max(told.at, *(min(end, moment) for end in ends))))
    else:
        verdict.calm.append(max(0.0, moment - told.at))


def _clear(spells: Iterable[Spell], at: float, seconds: float) -> float:
    """From when on nothing goes wrong for so many seconds."""
    clear = at
    for spell in spells:
        if spell.begin < clear + seconds and spell.end > clear:
            clear = spell.end
    return clear
