"""Histograms count as Prometheus' own do."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from spotjax.telemetry.histogram import Histogram

BOUNDS = (0.01, 0.1, 1.0, 10.0)
VALUES = st.lists(st.tuples(st.sampled_from((0.0, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0, 11.0)), st.integers(0, 3)))


@given(VALUES)
def test_buckets_and_sum_are_those_of_prometheus_client(values: list[tuple[float, int]]) -> None:
    ours, registry = Histogram(BOUNDS), CollectorRegistry()
    reference = Reference("x", "x", buckets=BOUNDS, registry=registry)
    for value, count in values:
        ours.observe(value, count)
        for _ in range(count):
            reference.observe(value)
    samples = {s.labels.get("le", s.name): s.value for family in registry.collect() for s in family.samples}
    assert dict(ours.buckets()) == {bound: samples[bound] for bound in ("0.01", "0.1", "1.0", "10.0", "+Inf")}
    assert ours.count == samples["x_count"]
    assert abs(ours.sum - samples["x_sum"]) < 1e-9
