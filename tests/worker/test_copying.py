"""What is copied next of a stage's KV: everything once, and nothing counts as copied that may not be."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from ledger_cases import Row, arrays, copy, make_ledger, step

from spotjax.worker.copying import Copying


def test_full_pages_and_the_latest_positions_are_due() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    assert copying.due(10) == [(1, 0, 5, 4), (1, 1, 3, 8), (1, 2, 8, 10)]
    copy(copying)
    assert copying.due(10) == []
    step(ledger, [(1, 10, 1, [5, 3, 8])])
    assert copying.due(10) == [(1, 2, 8, 11)], "only the page that has grown"


def test_what_is_copied_in_parts_comes_in_order() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    copy(copying, 2)
    assert copying.due(10) == [(1, 2, 8, 10)]


def test_those_with_most_to_copy_are_last() -> None:
    ledger = make_ledger()
    step(ledger, [(1, 0, 10, [5, 3, 8]), (2, 0, 2, [4])])
    assert [page.sequence for page in Copying(ledger).due(2)] == [2, 1]


def test_pages_that_change_hands_take_the_old_owner_with_them() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 8, [5, 3])])
    due = copying.due(10)
    ledger.begin([2], *arrays([(2, 0, 4, [3])]))  # before the step that writes page 3 is dispatched
    with ledger.lock:
        assert not ledger.still_owned(due), "page 3 is another's from now on"
    assert copying.due(10) == []


def test_a_sequence_that_got_other_pages_begins_anew() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 8, [5, 3])])
    copy(copying)
    step(ledger, [(1, 0, 8, [7, 9])])
    assert copying.due(10) == [(1, 0, 7, 4), (1, 1, 9, 8)]


def test_what_was_sent_to_somebody_who_is_gone_is_due_again() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 8, [5, 3])])
    copy(copying)
    source = copying.source
    copying.restart()
    assert len(copying.due(10)) == 2 and copying.source != source
    ledger.forget([1])
    assert copying.due(10) == []


def test_a_copy_under_way_when_the_keeper_changes_does_not_count_as_copied() -> None:
    ledger = make_ledger()
    before = Copying(ledger)
    step(ledger, [(1, 0, 8, [5, 3])])
    due = before.due(10)
    after = Copying(ledger)  # to another keeper, who has none of these
    before.copied(due)
    assert after.due(10) == due and after.source != before.source
    after.copied(due)
    assert after.due(10) == []


def test_what_has_gone_on_since_it_was_read_is_copied_no_further_than_it_was_read() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 6, [5, 3])])
    due = copying.due(10)
    step(ledger, [(1, 6, 1, [5, 3])])
    copying.copied(due)
    assert copying.due(10) == [(1, 1, 3, 7)]


def test_a_copy_that_is_under_way_while_less_becomes_certain_is_no_copy_of_more() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    due = copying.due(10)
    ledger.keep({1: 9})
    with ledger.lock:
        assert not ledger.still_owned(due), "what is in the pages beyond is not to be copied any more"
    copying.copied(due)
    step(ledger, [(1, 9, 3, [5, 3, 8])])  # with another token, perhaps, than before
    assert (1, 2, 8, 12) in copying.due(10)


def test_a_copy_of_more_than_is_certain_is_not_taken_for_what_comes_instead() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 10, [5, 3, 8])])
    copy(copying)
    ledger.keep({1: 9})
    step(ledger, [(1, 9, 1, [5, 3, 8])])
    assert (1, 2, 8, 10) in copying.due(10)


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_what_was_copied_last_is_what_the_stage_has(seed: int, limit: int) -> None:
    """Sequences step, lose pages and become less certain while copying, of which a copy is made in between."""
    random, ledger = Random(seed), make_ledger(page_size=2)
    copying, version = Copying(ledger), 0
    content: dict[int, dict[int, int]] = {key: {} for key in range(3)}  # by sequence: position to what was written
    copies: dict[tuple[int, int], tuple[int, ...]] = {}  # page of a sequence to what was in its positions
    watermark: dict[int, int] = {}
    pages: dict[int, list[int]] = {key: [] for key in range(3)}
    done: dict[int, int] = dict.fromkeys(range(3), 0)
    for _ in range(30):
        key, version = random.randrange(3), version + 1
        act = random.choice(["step", "step", "step", "lose", "keep"])
        if act == "step":
            length = random.randint(1, 3)
            while 2 * len(pages[key]) < done[key] + length:
                page = random.choice([page for page in range(1, 9) if page not in pages[key]])
                for other in (o for o in pages if page in pages[o]):
                    pages[other], done[other], content[other] = [], 0, {}
                pages[key].append(page)
            row: Row = (key, done[key], length, list(pages[key]))
            step(ledger, [row])
            content[key] |= dict.fromkeys(range(done[key], done[key] + length), version)
            done[key] += length
            if done[key] > 9:
                pages[key], done[key], content[key] = [], 0, {}
                ledger.forget([key])
        elif act == "lose":
            pages[key], done[key], content[key] = [], 0, {}
        else:
            done = {one: random.randint(max(0, n - 1), n) for one, n in done.items()}
            ledger.keep(done)
            pages = {one: owned[: -(-done[one] // 2)] for one, owned in pages.items()}
        due = copying.due(limit)
        with ledger.lock:
            taken = ledger.still_owned(due)
        for page in due if taken else ():
            own = content[page.sequence]
            copies[page.sequence, page.number] = tuple(own.get(n, -1) for n in range(2 * page.number, page.positions))
            watermark[page.sequence] = page.positions
        if taken:
            copying.copied(due)
    while due := copying.due(limit):
        for page in due:
            own = content[page.sequence]
            copies[page.sequence, page.number] = tuple(own.get(n, -1) for n in range(2 * page.number, page.positions))
            watermark[page.sequence] = page.positions
        copying.copied(due)
    for key, owned, written in ledger.remains():
        assert watermark[key] == written
        if done[key] == written:  # else it is what it has lost and nobody has taken
            copied = [mark for n in range(len(owned)) for mark in copies.get((key, n), ())][:written]
            assert copied == [content[key][n] for n in range(written)]


def test_pages_that_are_not_full_yet_are_left_for_later() -> None:
    ledger = make_ledger()
    copying = Copying(ledger)
    step(ledger, [(1, 0, 10, [5, 3, 8]), (2, 0, 3, [6])])
    due = copying.due(10, full=True)
    assert due == [(1, 0, 5, 4), (1, 1, 3, 8)]
    copying.copied(due)
    assert copying.due(10, full=True) == []
    assert copying.due(10) == [(1, 2, 8, 10), (2, 0, 6, 3)]


def test_there_is_an_end_to_copying_though_steps_go_on() -> None:
    """Forty sequences decode, one position each for every sixteen pages that are copied."""
    ledger = make_ledger()
    copying, sequences = Copying(ledger), range(40)
    pages = {key: list(range(30 * key + 1, 30 * key + 31)) for key in sequences}
    step(ledger, [(key, 0, 10, pages[key]) for key in sequences])
    copying.freeze()
    copied, position = set[int](), 10
    while due := copying.due(16):
        copied |= {page.sequence for page in due}
        copying.copied(due)
        step(ledger, [(key, position, 1, pages[key]) for key in sequences])
        position += 1
        assert position < 100, "copying never ends"
    assert copied == set(sequences)
