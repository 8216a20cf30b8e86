"""What a worker knows of its stages' pages: nothing counts as copied, or as there, that may not be."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from ledger_cases import Row, arrays, make_ledger, step

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
    for key, number, page, positions in Copying(ledger).due(100):
        assert content[page] == (key, number) and 2 * number < positions <= 2 * number + 2
