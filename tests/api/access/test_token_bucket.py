"""Token buckets and meters against an obvious slow version, in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.api.access.callers import Caller, CallerLimits
from spotjax.api.access.metering import Meters
from spotjax.api.access.token_bucket import TokenBucket
from spotjax.errors import PermissionDenied, RateLimited


class SlowBucket:
    """Fills by one unit of 1/16 s after the other."""

    def __init__(self, capacity: int, per_tick: float) -> None:
        self.capacity, self.per_tick, self.level = capacity, per_tick, float(capacity)

    def tick(self) -> None:
        self.level = min(self.capacity, self.level + self.per_tick)


steps = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=30)


@given(capacity=st.integers(1, 64), seconds=st.sampled_from([1, 4, 16, 64]), steps=steps)
def test_a_bucket_is_what_filling_it_tick_by_tick_gives(
    capacity: int, seconds: int, steps: list[tuple[int, int]]
) -> None:
    bucket, slow, now = TokenBucket.full(capacity, seconds, 0.0), SlowBucket(capacity, capacity / seconds / 16), 0.0
    for ticks, amount in steps:
        for _ in range(ticks):
            slow.tick()
        now += ticks / 16
        assert bucket.level_at(now) == pytest.approx(slow.level, abs=1e-6)
        wait = bucket.wait(amount, now)
        if amount > capacity:
            assert wait == float("inf")
        else:
            assert bucket.level_at(now + wait) >= amount - 1e-6
            assert wait == 0 or bucket.level_at(now + 0.9 * wait) < amount
        bucket = bucket.take(amount, now)
        slow.level -= amount


@given(amounts=st.lists(st.integers(1, 30), max_size=60), gaps=st.lists(st.floats(0, 20), min_size=60, max_size=60))
def test_nobody_gets_more_prompts_through_than_capacity_and_rate_allow(amounts: list[int], gaps: list[float]) -> None:
    now = [0.0]
    meters = Meters(lambda: now[0])
    caller = Caller("ann", limits=CallerLimits(tokens_per_minute=30))
    through = 0
    for amount, gap in zip(amounts, gaps, strict=False):
        now[0] += gap
        try:
            meters.admit(caller, amount)
            through += amount
        except RateLimited as refusal:
            assert refusal.retry_after > 0
    assert through <= 30 + 30 * now[0] / 60 + 1e-6


def test_output_overdraws_and_later_requests_wait_until_it_is_paid_back() -> None:
    now = [0.0]
    meters = Meters(lambda: now[0])
    caller = Caller("ann", limits=CallerLimits(tokens_per_minute=60))
    meters.admit(caller, 10)
    meters.generated("ann", 80)  # 30 more than there were
    with pytest.raises(RateLimited) as refusal:
        meters.admit(caller, 1)
    assert refusal.value.retry_after == pytest.approx(31)
    now[0] += 31
    meters.admit(caller, 1)


def test_a_day_and_a_minute_are_counted_apart() -> None:
    now = [0.0]
    meters = Meters(lambda: now[0])
    caller = Caller("ann", limits=CallerLimits(tokens_per_minute=60, tokens_per_day=100))
    meters.admit(caller, 60)
    now[0] += 60
    with pytest.raises(RateLimited, match="tokens_per_day"):
        meters.admit(caller, 50)


def test_a_prompt_beyond_the_limit_is_refused_for_good() -> None:
    caller = Caller("ann", limits=CallerLimits(tokens_per_minute=60))
    with pytest.raises(PermissionDenied, match="61 tokens"):
        Meters(lambda: 0.0).admit(caller, 61)


def test_a_limit_that_is_changed_holds_from_the_next_request_on() -> None:
    meters = Meters(lambda: 0.0)
    meters.admit(Caller("ann", limits=CallerLimits(requests_per_minute=1)), 1)
    with pytest.raises(RateLimited):
        meters.admit(Caller("ann", limits=CallerLimits(requests_per_minute=1)), 1)
    meters.admit(Caller("ann", limits=CallerLimits(requests_per_minute=2)), 1)
