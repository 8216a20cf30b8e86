"""What a worker knows of its stages' pages: nothing counts as copied, or as there, that may not be."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from ledger_cases import Row, arrays, copy, make_ledger, step


def test_full_pages_and_the_latest_positions_are_due() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    assert ledger.due(10) == [(1, 0, 5, 4), (1, 1, 3, 8), (1, 2, 8, 10)]
    copy(ledger)
    assert ledger.due(10) == []
    step(ledger, [(1, 10, 1, [5, 3, 8])])
    assert ledger.due(10) == [(1, 2, 8, 11)], "only the page that has grown"


def test_what_is_copied_in_parts_comes_in_order() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    copy(ledger, 2)
    assert ledger.due(10) == [(1, 2, 8, 10)]


def test_pages_that_change_hands_take_the_old_owner_with_them() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3])])
    due = ledger.due(10)
    ledger.begin([2], *arrays([(2, 0, 4, [3])]))  # before the step that writes page 3 is dispatched
    with ledger.lock:
        assert not ledger.still_owned(due), "page 3 is another's from now on"
    assert ledger.due(10) == []


def test_a_sequence_that_got_other_pages_begins_anew() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3])])
    copy(ledger)
    step(ledger, [(1, 0, 8, [7, 9])])
    assert ledger.due(10) == [(1, 0, 7, 4), (1, 1, 9, 8)]


def test_what_was_sent_to_somebody_who_is_gone_is_due_again() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3])])
    copy(ledger)
    ledger.restart()
    assert len(ledger.due(10)) == 2
    ledger.forget([1])
    assert ledger.due(10) == []


def test_a_copy_under_way_when_the_keeper_changes_does_not_count_as_copied() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3])])
    sent_as, due = ledger.source, ledger.due(10)
    ledger.restart()  # another keeps copies from now on, who has none of these
    ledger.copied(due, sent_as)
    assert ledger.due(10) == due and ledger.source != sent_as
    ledger.copied(due, ledger.source)
    assert ledger.due(10) == []


def test_what_has_gone_on_since_it_was_read_is_copied_no_further_than_it_was_read() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 6, [5, 3])])
    due = ledger.due(10)
    step(ledger, [(1, 6, 1, [5, 3])])
    ledger.copied(due, ledger.source)
    assert ledger.due(10) == [(1, 1, 3, 7)]


def test_what_is_there_is_told_with_its_pages() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 6, [5, 3]), (2, 0, 4, [7])])
    ledger.begin([3], *arrays([(3, 0, 2, [9])]))  # a step that has not been dispatched
    assert ledger.remains() == ((1, (5, 3), 6), (2, (7,), 4))


def test_only_what_is_certain_is_kept_and_no_copy_of_more_counts() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8]), (2, 0, 4, [7]), (3, 0, 2, [9])])
    copy(ledger)
    ledger.keep({1: 9, 3: 5, 4: 1, 2: 0})
    assert ledger.remains() == ((1, (5, 3, 8), 9), (3, (9,), 2))
    step(ledger, [(1, 9, 1, [5, 3, 8])])  # with another token, perhaps, than before
    assert ledger.due(10) == [(1, 2, 8, 10)]


def test_a_copy_that_is_under_way_while_less_becomes_certain_is_no_copy_of_more() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    due = ledger.due(10)
    ledger.keep({1: 9})
    with ledger.lock:
        assert not ledger.still_owned(due), "what is in the pages beyond is not to be copied any more"
    ledger.copied(due, ledger.source)
    step(ledger, [(1, 9, 3, [5, 3, 8])])
    assert ledger.due(10) == [(1, 2, 8, 12)]


def test_pages_that_others_are_brought_into_are_nobodys_of_before() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3]), (2, 0, 4, [7])])
    step(ledger, [(3, 0, 4, [9])])
    step(ledger, [(3, 0, 4, [6])])  # it lost its page 9, which nobody has taken since
    due = ledger.due(10)
    ledger.overwrite([3, 9, 11])
    with ledger.lock:
        assert not ledger.still_owned(due)
    assert ledger.remains() == ((2, (7,), 4), (3, (6,), 4))


@given(st.integers(0, 2**32))
def test_whoever_is_said_to_be_there_wrote_last_into_all_its_pages(seed: int) -> None:
    """Sequences step, lose pages, are brought from elsewhere, become less certain and end at random."""
    random, ledger = Random(seed), make_ledger(page_size=2)
    content: dict[int, tuple[int, int]] = {}  # page: (sequence, positions from its first page's first on)
    pages: dict[int, list[int]] = {}
    for _ in range(40):
        key, act = random.randrange(4), random.choice(["step", "step", "step", "other pages", "bring", "keep", "end"])
        if act == "step" and len(pages.setdefault(key, [])) < 4:
            owned = pages[key]
            start = 0 if not owned else random.randint(1, 2 * len(owned))
            length = random.randint(1, 3)
            while 2 * len(owned) < start + length:
                page = random.choice([page for page in range(1, 12) if page not in owned])
                for other in pages.values():
                    if page in other:
                        other.clear()
                owned.append(page)
            row: Row = (key, start, length, list(owned))
            step(ledger, [row])
            for number, page in enumerate(owned):
                if 2 * number < start + length:
                    content[page] = key, number
        elif act == "other pages":
            pages[key] = []
        elif act == "bring":
            page = random.randrange(1, 12)
            if not any(page in owned for owned in pages.values()):
                ledger.overwrite([page])
                content.pop(page, None)
        elif act == "keep":
            ledger.keep({n: random.randrange(9) for n in range(4) if random.random() < 0.8})
        elif act == "end":
            ledger.forget([key])
            pages[key] = []
    for key, owned, positions in ledger.remains():
        assert positions <= 2 * len(owned)
        for number in range(-(-positions // 2)):
            assert content[owned[number]] == (key, number)
    for key, number, page, positions in ledger.due(100):
        assert content[page] == (key, number) and 2 * number < positions <= 2 * number + 2
