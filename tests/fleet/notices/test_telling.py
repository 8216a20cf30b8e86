"""What a worker hears is told to the others unchanged, and says how long it may go on."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.commands.views import notices_line
from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.standing import LEAD_SECONDS, Standing
from spotjax.fleet.notices.telling import message_of, of_host, seconds_left, word_of
from spotjax.protocol import control

words = st.one_of(
    st.builds(
        Notice, st.text(), st.sampled_from(NoticeKind), st.just("vm"), st.none() | st.floats(0, 1e6), st.just("it")
    ),
    st.builds(Withdrawn, st.text(), st.just("vm"), st.just("it")),
)


@given(words, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_word_is_the_same_on_the_clock_of_another_process(
    word: Notice | Withdrawn, here: float, there: float
) -> None:
    message = control.decode_from_worker(control.encode(message_of(word, here)))
    assert isinstance(message, control.Noticed | control.NoticeWithdrawn)
    told = word_of(message, "vm", there)
    if isinstance(word, Notice) and word.deadline is not None:
        assert isinstance(told, Notice) and told.deadline is not None
        assert told.deadline - there == pytest.approx(max(0.0, word.deadline - here), abs=1e-6)
        told = Notice(told.source, told.kind, told.instance, word.deadline, told.evidence)
    assert told == word


def test_hosts_of_a_slice_are_told_apart_and_its_first_one_speaks_for_it() -> None:
    word = Withdrawn("tpu", "slice", "")
    assert of_host(word, 0) == word and of_host(word, 3).source == "tpu@host-3"


@pytest.mark.parametrize(
    ("kind", "deadline", "ready", "unready"),
    [
        (NoticeKind.REBALANCE, None, inf, inf),
        (NoticeKind.PREEMPT, 130.0, 30.0, 0.0),
        (NoticeKind.PREEMPT, 90.0, 0.0, 0.0),
        (NoticeKind.PREEMPT, None, 5.0, 0.0),
        (NoticeKind.MAINTENANCE, 100.0 + 1000, 1000.0, 1000.0 - LEAD_SECONDS),
        (NoticeKind.MAINTENANCE, 130.0, 30.0, 0.0),
    ],
)
def test_a_worker_goes_on_until_its_machine_ends_and_joins_only_if_that_is_worth_it(
    kind: NoticeKind, deadline: float | None, ready: float, unready: float
) -> None:
    stands = Standing().hear(Notice("gce", kind, "vm", deadline, ""), 100.0)
    assert seconds_left(stands, 100.0, ready=True) == ready
    assert seconds_left(stands, 100.0, ready=False) == unready
    assert seconds_left(Standing(), 100.0, ready=False) == inf


def test_people_see_what_notices_came_to() -> None:
    assert notices_line(NoticeRecord("gce", 1)) == "notices of gce: 1 given"
    both = NoticeRecord("aws", 5, 1, 2, 2, 12.06, 31.0)
    assert notices_line(both) == "notices of aws: 5 given, 1 withdrawn, 2 left in time, 2 taken after 12.1 to 31.0 s"
