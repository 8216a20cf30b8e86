"""What several sources say together is as bad as the worst word and as urgent as the most urgent one."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.standing import ASSUMED_SECONDS, LEAD_SECONDS, Standing, Word, acted_on_from

SOURCES = ("gce", "gce-maintenance", "signal")
moments = st.integers(0, 40).map(float)


def notice(source: str, kind: NoticeKind, deadline: float | None = None, evidence: str = "") -> Notice:
    return Notice(source, kind, "vm", deadline, evidence)


words = st.one_of(
    st.builds(
        notice, st.sampled_from(SOURCES), st.sampled_from(NoticeKind), st.none() | moments, st.sampled_from(["a", "b"])
    ),
    st.builds(Withdrawn, st.sampled_from(SOURCES), st.just("vm"), st.just("")),
)
histories = st.lists(st.tuples(words, moments), max_size=12).map(lambda told: sorted(told, key=lambda entry: entry[1]))


def after(history: Sequence[tuple[Word, float]]) -> Standing:
    stands = Standing()
    for word, now in history:
        stands = stands.hear(word, now)
    return stands


def slow(history: Sequence[tuple[Word, float]], source: str) -> tuple[NoticeKind, float | None] | None:
    """What one source holds, from all that it ever said."""
    holds: tuple[NoticeKind, float | None] | None = None
    for word, now in history:
        if word.source != source:
            continue
        if isinstance(word, Withdrawn):
            holds = None
        elif word.kind is NoticeKind.REBALANCE or word.deadline is not None:
            holds = word.kind, word.deadline
        elif holds is None or holds[0] is NoticeKind.REBALANCE or holds[1] is None:
            holds = word.kind, now + ASSUMED_SECONDS
        else:
            holds = word.kind, min(holds[1], now + ASSUMED_SECONDS)
    return holds


@given(histories)
def test_every_source_holds_its_newest_word_and_together_the_earliest_deadline_and_the_worst_kind_count(
    history: Sequence[tuple[Word, float]],
) -> None:
    stands = after(history)
    held = {source: holds for source in SOURCES if (holds := slow(history, source)) is not None}
    assert {source: (word.kind, word.deadline) for source, word in stands.words.items()} == held
    ends = [deadline for kind, deadline in held.values() if kind is not NoticeKind.REBALANCE and deadline is not None]
    if not held:
        assert stands.notice is None
    elif not ends:
        assert stands.notice is not None and stands.notice.kind is NoticeKind.REBALANCE
    else:
        worst = max((kind for kind, _ in held.values()), key=list(NoticeKind).index)
        assert stands.notice is not None
        assert (stands.notice.kind, stands.notice.deadline) == (worst, min(ends))
        assert held[stands.notice.source][1] == min(ends)


@given(histories, words, moments)
def test_nobody_puts_off_what_another_source_holds(
    history: Sequence[tuple[Word, float]], word: Word, later: float
) -> None:
    stands = after(history)
    others = [
        held.deadline
        for source, held in stands.words.items()
        if source != word.source and held.kind is not NoticeKind.REBALANCE and held.deadline is not None
    ]
    notice = stands.hear(word, 40 + later).notice
    if others:
        assert notice is not None and notice.deadline is not None and notice.deadline <= min(others)


@given(histories, moments)
def test_a_word_said_again_changes_nothing_however_often(history: Sequence[tuple[Word, float]], later: float) -> None:
    stands = after(history)
    for word in stands.words.values():
        assert stands.hear(word, 40 + later) is stands
        if word.deadline is not None:
            travelled = notice(word.source, word.kind, word.deadline + 0.3, word.evidence)
            assert stands.hear(travelled, 40 + later) is stands


def test_maintenance_is_acted_on_shortly_before_advice_never_and_a_preemption_at_once() -> None:
    assert acted_on_from(None) == acted_on_from(notice("a", NoticeKind.REBALANCE)) == inf
    assert acted_on_from(notice("a", NoticeKind.MAINTENANCE, 4000.0)) == 4000.0 - LEAD_SECONDS
    assert acted_on_from(notice("a", NoticeKind.PREEMPT, 4000.0)) == -inf
    both = (
        Standing().hear(notice("a", NoticeKind.MAINTENANCE, 4000.0), 0.0).hear(notice("b", NoticeKind.PREEMPT, 60.0), 1)
    )
    assert acted_on_from(both.notice) == -inf and both.notice is not None and both.notice.deadline == 60.0
