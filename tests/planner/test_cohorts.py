from hypothesis import given
from hypothesis import strategies as st

from spotjax.planner.cohorts import assign_cohorts
from spotjax.planner.kv_cohorts import LiveSequence

sequences = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), max_size=5).map(
    lambda entries: [LiveSequence(key, pages, progress) for key, (pages, progress) in enumerate(entries)]
)
live = st.dictionaries(st.integers(0, 4), sequences, max_size=4)


@given(live, st.integers(1, 4), st.integers(0, 12))
def test_every_sequence_goes_to_one_replica_or_is_recomputed_and_none_overflows(live, replicas, capacity) -> None:
    result = assign_cohorts(live, replicas, capacity, 4)
    given_out = [(c.old, s) for c in result.cohorts for s in c.sequences] + list(result.recomputed)
    assert sorted(given_out, key=repr) == sorted(((old, s) for old, mine in live.items() for s in mine), key=repr)
    for new in range(replicas):
        assert sum(c.pages for c in result.cohorts if c.new == new) <= capacity
    assert len({c.name for c in result.cohorts}) == len(result.cohorts)
    assert all(0 <= c.new < replicas and c.sequences for c in result.cohorts)


@given(live, st.integers(1, 4), st.integers(0, 12))
def test_nothing_is_recomputed_that_would_fit_where_most_is_free(live, replicas, capacity) -> None:
    result = assign_cohorts(live, replicas, capacity, 4)
    free = [capacity - sum(c.pages for c in result.cohorts if c.new == new) for new in range(replicas)]
    assert all(sequence.pages > max(free) for _, sequence in result.recomputed)


@given(live, st.integers(1, 4))
def test_with_room_enough_old_replicas_with_most_kv_stay_whole(live, replicas) -> None:
    result = assign_cohorts(live, replicas, 1000, 4)
    assert not result.recomputed
    pages = {old: sum(s.pages for s in mine) for old, mine in live.items()}
    heirs = sorted(pages, key=lambda old: (-pages[old], old))[:replicas]
    for old in heirs:
        targets = {c.new for c in result.cohorts if c.old == old}
        assert targets <= {old} if old < replicas else len(targets) <= 1


def test_fewer_replicas_keep_what_has_most_progress() -> None:
    live = {
        0: [LiveSequence(1, 2, 5)],
        1: [LiveSequence(1, 2, 9), LiveSequence(2, 2, 30), LiveSequence(3, 2, 20)],
        2: [LiveSequence(7, 2, 8), LiveSequence(8, 2, 6)],
    }
    result = assign_cohorts(live, 2, page_capacity=5, page_size=4)
    kept = {(c.old, c.new): [s.key for s in c.sequences] for c in result.cohorts}
    assert kept == {(1, 1): [2, 3], (2, 0): [7, 8]}
    assert [(old, s.key) for old, s in result.recomputed] == [(1, 1), (0, 1)]
