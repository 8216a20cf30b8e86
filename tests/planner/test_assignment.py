from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import fleet, llama, placed

from spotjax.meshes.shape import MeshShape
from spotjax.planner.assignment import assign
from spotjax.planner.holdings import Holdings
from spotjax.planner.matcher import match
from spotjax.planner.needs import needs_of

tables = st.tuples(st.integers(1, 4), st.integers(0, 1)).flatmap(
    lambda size: st.tuples(
        *(
            st.lists(
                st.lists(st.integers(0, 3), min_size=sum(size), max_size=sum(size)),
                min_size=size[0],
                max_size=size[0],
            )
            for _ in range(2)
        )
    )
)


@given(tables)
def test_of_all_assignments_of_the_greatest_weight_the_slowest_row_takes_the_least_time(case) -> None:
    weights, seconds = np.array(case[0], dtype=np.int64), np.array(case[1], dtype=np.float64)
    rows = range(len(weights))
    every = list(permutations(range(weights.shape[1]), len(weights)))
    most = max(sum(weights[r, c] for r, c in zip(rows, columns, strict=True)) for columns in every)
    best = min(
        max(seconds[r, c] for r, c in zip(rows, columns, strict=True))
        for columns in every
        if sum(weights[r, c] for r, c in zip(rows, columns, strict=True)) == most
    )
    chosen = assign(weights, seconds)
    assert sum(weights[r, c] for r, c in zip(rows, chosen, strict=True)) == most
    assert max(seconds[r, c] for r, c in zip(rows, chosen, strict=True)) == pytest.approx(best)


def test_at_equal_bytes_the_faster_network_takes_what_must_be_copied() -> None:

    spec, shape = llama(layers=3), MeshShape(2, 1, 1)
    instances = fleet(1, 1, 1)
    before = placed(spec, MeshShape(1, 1, 1), instances[:1])
    fast = replace(instances[2], type=replace(instances[2].type, network_bandwidth=1e11))
    hosts = [instances[0], instances[1], fast]
    matching = match(shape, needs_of(spec, shape, ((0, 3),), ()), hosts, Holdings.of(spec, before, (), hosts))
    assert {device.instance for device in matching.values()} == {"i0", "i2"}
