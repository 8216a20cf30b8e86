"""Who keeps whose KV: never oneself, another zone before the same, the mesh before spares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spotjax.fleet.keepers import choose_keepers

names = st.text("abcd", min_size=1, max_size=3)


@given(zones=st.dictionaries(names, st.sampled_from(["", "x", "y"]), max_size=8), data=st.data())
def test_everybody_has_a_keeper_where_there_is_one(zones: dict[str, str], data: st.DataObject) -> None:
    used = data.draw(st.sets(st.sampled_from(sorted(zones)))) if zones else set()
    keepers = choose_keepers(used, zones)
    assert keepers.keys() == (used if len(zones) > 1 else set())
    for instance, keeper in keepers.items():
        assert keeper in zones and keeper != instance
        members = used - {instance}
        assert (keeper in members) == bool(members), "a spare only where the mesh has no other"
        candidates = members or zones.keys() - {instance}
        if any(zones[other] != zones[instance] for other in candidates):
            assert zones[keeper] != zones[instance]


def test_keeping_goes_round() -> None:
    zones = dict.fromkeys(("a", "b", "c", "spare"), "")
    assert choose_keepers({"a", "b", "c"}, zones) == {"a": "b", "b": "c", "c": "a"}


def test_who_is_not_ready_neither_keeps_nor_is_kept_for() -> None:
    assert choose_keepers({"a", "b"}, {"a": ""}) == {}
