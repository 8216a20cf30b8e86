"""What a worker knows of its stages' pages: nothing counts as copied, or as there, that may not be."""

from __future__ import annotations

from itertools import count
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from ledger_cases import Row, arrays, copy, make_ledger, step

from spotjax.worker.copying import Copying


def test_what_is_there_is_told_with_its_pages() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 6, [5, 3]), (2, 0, 4, [7])])
    ledger.begin([3], *arrays([(3, 0, 2, [9])]))  # a step that has not been dispatched
    assert ledger.remains() == ((1, (5, 3), 6), (2, (7,), 4))


def test_only_what_is_certain_is_kept() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8]), (2, 0, 4, [7]), (3, 0, 2, [9])])
    ledger.keep({1: 9, 3: 5, 4: 1, 2: 0})
    assert ledger.remains() == ((1, (5, 3, 8), 9), (3, (9,), 2))


def test_what_has_ended_has_nothing() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8]), (2, 0, 4, [7])])
    ledger.forget([1, 9])
    assert ledger.remains() == ((2, (7,), 4),)


def test_pages_that_others_are_brought_into_are_nobodys_of_before() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 8, [5, 3]), (2, 0, 4, [7])])
    step(ledger, [(3, 0, 4, [9])])
    step(ledger, [(3, 0, 4, [6])])  # it lost its page 9, which nobody has taken since
    due = Copying(ledger).due(10)
    ledger.overwrite([3, 9, 11])
    with ledger.lock:
        assert not ledger.still_owned(due)
    assert ledger.remains() == ((2, (7,), 4), (3, (6,), 4))


def test_pages_that_a_step_only_reads_are_both_sequences_and_all_of_either_is_copied() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 9, [5, 3, 8])])
    copy(copying)
    step(ledger, [(2, 8, 3, [5, 3, 9])])  # it found what the first has computed
    step(ledger, [(1, 9, 1, [5, 3, 8])])
    assert ledger.remains() == ((1, (5, 3, 8), 10), (2, (5, 3, 9), 11))
    assert [(due.sequence, due.page) for due in copying.due(10)] == [(1, 8), (2, 5), (2, 3), (2, 9)]


def test_who_writes_a_page_that_was_shared_takes_it_from_all() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 9, [5, 3, 8])])
    step(ledger, [(2, 8, 3, [5, 3, 9]), (3, 4, 4, [5, 7])])
    step(ledger, [(4, 0, 2, [3])])
    assert ledger.remains() == ((3, (5, 7), 8), (4, (3,), 2))
    ledger.overwrite([5])
    assert ledger.remains() == ((4, (3,), 2),)


def test_who_comes_back_to_pages_of_its_own_has_them() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 11, [5, 3, 8])])
    step(ledger, [(2, 8, 3, [5, 3, 9])])
    step(ledger, [(1, 8, 3, [5, 3, 7])])  # it was sent back, and found its first pages
    assert ledger.remains() == ((1, (5, 3, 7), 11), (2, (5, 3, 9), 11))


@given(st.integers(0, 2**32))
def test_whoever_is_said_to_be_there_has_what_was_written_last_into_all_its_pages(seed: int) -> None:
    """Sequences step, find prefixes of others, lose pages, are brought from elsewhere, become less certain and end."""
    random, ledger, writes = Random(seed), make_ledger(page_size=2), count()
    content: dict[int, int] = {}  # of every page: when it was given to whoever filled it
    pages: dict[int, list[int]] = {key: [] for key in range(4)}
    mine: dict[int, list[int]] = {key: [] for key in range(4)}  # what was in a sequence's pages when it got them
    shared, written = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0)
    for _ in range(40):
        key, act = random.randrange(4), random.choice(["step", "step", "step", "other pages", "bring", "keep", "end"])
        owned, other = pages[key], random.randrange(4)
        if act == "step" and len(owned) < 4:
            if not owned:
                shared[key] = random.randint(0, len(pages[other]) and written[other] // 2) if other != key else 0
                owned += pages[other][: shared[key]]
                mine[key] = [content[page] for page in owned]
                start = 2 * shared[key]
            else:
                start = random.randint(2 * shared[key] or 1, 2 * len(owned))
            written[key] = start + random.randint(1, 3)
            while 2 * len(owned) < written[key]:
                page = random.choice([page for page in range(1, 12) if page not in owned])
                for others in pages.values():
                    if page in others:
                        others.clear()
                owned.append(page)
                content[page] = next(writes)
                mine[key].append(content[page])
            row: Row = (key, start, written[key] - start, list(owned))
            step(ledger, [row])
        elif act == "other pages":
            pages[key] = []
        elif act == "bring":
            page = random.randrange(1, 12)
            if not any(page in owned for owned in pages.values()):
                ledger.overwrite([page])
                content[page] = next(writes)
        elif act == "keep":
            ledger.keep({n: random.randrange(9) for n in range(4) if random.random() < 0.8})
        elif act == "end":
            ledger.forget([key])
            pages[key] = []
    there = {key: owned for key, owned, _ in ledger.remains()}
    for key, owned, positions in ledger.remains():
        assert positions <= 2 * len(owned)
        for number in range(-(-positions // 2)):
            assert content[owned[number]] == mine[key][number]
    for key, number, page, positions in Copying(ledger).due(100):
        assert page == there[key][number] and 2 * number < positions <= 2 * number + 2
