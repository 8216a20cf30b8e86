"""The account: never below what counting by the minute gives, and whole on disk at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from capacity_cases import ON_DEMAND, SETTINGS, SPOT_A
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import ConfigError
from spotjax.fleet.capacity import ledger as ledgers
from spotjax.fleet.capacity.ledger import DAY, HOUR, Ledger
from spotjax.fleet.capacity.ledger_file import NAME, LedgerFile
from spotjax.fleet.providers.provider import Offer


def test_on_demand_costs_what_the_same_machines_would_and_nothing_is_said_where_a_price_is_missing() -> None:
    ledger = Ledger()
    assert ledgers.on_demand_rate(ledger, ()) == 0.0
    for offer in (SPOT_A, SPOT_A, ON_DEMAND):
        ledger, _ = ledgers.asked(ledger, "f", offer, 0.0)
    assert ledgers.on_demand_rate(ledger, [SPOT_A]) == 0.0, "nobody offers the spot machines' type on demand"
    elsewhere = [Offer(SPOT_A.type, zone, "on_demand", price) for zone, price in (("far", 9.0), ("farther", 8.0))]
    assert ledgers.on_demand_rate(ledger, elsewhere) == pytest.approx(2 * 8.0 + ON_DEMAND.price)
    here = Offer(SPOT_A.type, SPOT_A.zone, "on_demand", 8.5)
    assert ledgers.on_demand_rate(ledger, [*elsewhere, here]) == pytest.approx(2 * 8.5 + ON_DEMAND.price)


@given(
    start=st.integers(0, 86400),
    looks=st.lists(st.tuples(st.integers(1, 40000), st.booleans(), st.sampled_from([0.5, 1.0, 2.0])), max_size=8),
)
def test_a_day_and_the_whole_are_counted_as_minute_by_minute(start: int, looks: list[tuple[int, bool, float]]) -> None:
    now = 5 * DAY + start
    ledger, name = ledgers.asked(Ledger(), "f", SPOT_A, now)
    total, days, price, waited = 0.0, dict[int, float](), SPOT_A.price, False
    for seconds, waits, dearer in looks:
        for second in range(int(now), int(now) + seconds, 60):
            if not (waits and waited):
                part = min(60, int(now) + seconds - second) * max(price, dearer) / HOUR
                total, day = total + part, second // int(DAY)
                days[day] = days.get(day, 0.0) + part
        now, price, waited = now + seconds, dearer, waits
        ledger = ledgers.counted(ledger, now, {name} if waits else (), {name: dearer})
    assert ledger.total == pytest.approx(total)
    if looks:
        assert ledger.day == int(now // DAY)
        assert ledger.spent == pytest.approx(days.get(ledger.day, 0.0), abs=2 * 60 * 2.0 / HOUR)


def test_a_clock_that_goes_back_loses_nothing() -> None:
    ledger, _ = ledgers.asked(Ledger(), "f", SPOT_A, DAY)
    ledger = ledgers.counted(ledger, DAY + HOUR, (), {})
    back = ledgers.counted(ledger, DAY - HOUR, (), {})
    assert (back.spent, back.total, back.day) == (1.0, 1.0, 1)
    assert ledgers.counted(back, DAY + HOUR, (), {}).spent >= 1.0


def test_room_is_what_both_caps_leave() -> None:
    ledger, first = ledgers.asked(Ledger(), "f", ON_DEMAND, 0.0)
    hourly = msgspec.structs.replace(SETTINGS, cost_per_hour=5.0)
    assert ledgers.budget(ledger, hourly, ()).room == pytest.approx(2.0)
    tight = msgspec.structs.replace(hourly, cost_per_hour=2.0)
    assert ledgers.budget(ledger, tight, ()).excess == pytest.approx(1.0)
    assert ledgers.budget(ledger, tight, {first}).excess == 0.0, "it is on its way out"
    daily = msgspec.structs.replace(hourly, cost_per_day=3.0, stop_seconds=300.0)
    assert ledgers.budget(ledger, daily, ()).room == pytest.approx(2.0)
    ledger = ledgers.counted(ledger, 2400.0, (), {})  # 2 of 3 USD
    assert ledgers.budget(ledger, daily, ()).room == pytest.approx(4.0 - 3.0)
    ledger = ledgers.counted(ledger, 3301.0, (), {})
    assert ledgers.budget(ledger, daily, ()).excess == 3.0 and not ledgers.budget(ledger, daily, ()).room


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    assert file.read() == Ledger()
    ledger, _ = ledgers.asked(Ledger(), "f", SPOT_A, 1.5)
    file.write(ledger)
    assert LedgerFile(tmp_path).read() == ledger
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_damaged_account_is_refused_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"number": 3, "sp')
    with pytest.raises(ConfigError, match=r"spending.json cannot be read"):
        LedgerFile(tmp_path).read()


WRITES = """
import sys
from pathlib import Path
from spotjax.fleet.capacity.ledger import Ledger, asked
from spotjax.fleet.capacity.ledger_file import LedgerFile
from spotjax.fleet.providers.provider import Offer
file, ledger = LedgerFile(Path(sys.argv[1])), Ledger()
while True:
    ledger, _ = asked(ledger, "f", Offer("box" * 50, "a", "spot", 1.0), 0.0)
    file.write(ledger)
    print(ledger.number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_the_last_account_whole(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = 0
    with process.stdout as lines:
        deadline = time.monotonic() + 60
        for line in lines:
            said = int(line)
            if said == 40:
                os.kill(process.pid, signal.SIGKILL)
            assert time.monotonic() < deadline
    process.wait()
    ledger = LedgerFile(tmp_path).read()
    assert ledger.number in (said, said + 1) and len(ledger.entries) == ledger.number >= 40
