"""A recorded spot market kills and brings real workers, which the controller asks for, while clients ask for tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_cases import CONTROLLER, DONE_SECONDS, REQUESTS, load_on, more_tokens

from spotjax.sim.traces import own
from spotjax.sim.workload import SpotEvent, SpotTrace
from spotjax.tools.load import answers
from spotjax.tools.service import Service, running

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]  # the market does not wait for a busy machine

PERIOD = 20.0
"""Seconds after which the market takes one of three machines and gives another."""
MARKET = SpotTrace(
    "market",
    (
        SpotEvent(0.0, ("p0", "p1", "p2")),
        *(SpotEvent(60 + 60 * number, (f"p{number + 3}",), (f"p{number}",)) for number in range(100)),
    ),
    10_000.0,
)
FILE = """
[provider]
kind = "trace"
speed = {speed}
notice_seconds = {notice}
worker = {{devices_per_instance = 2, compilation_cache = "{programs}", parameter_store = "{store}"}}

[[provider.traces]]
file = "{trace}"
price = 0.5

[capacity]
least = 3
most = 3
on_demand = "never"
cost_per_hour = 10.0
action_seconds = 0.1
return_seconds = 1.0
"""


@pytest.mark.parametrize(("notice", "told"), [(0.0, "lost"), (5.0, "notice")])
async def test_no_token_is_lost_while_a_recorded_market_takes_and_gives(
    notice: float, told: str, programs: Path, tmp_path: Path
) -> None:
    own.write_spot(trace := tmp_path / "market.csv", MARKET)
    path = tmp_path / "capacity.toml"
    path.write_text(
        FILE.format(speed=60 / PERIOD, notice=notice, programs=programs, store=tmp_path / "store", trace=trace)
    )
    flags = (*CONTROLLER, "--capacity", str(path))
    async with running(Service(tmp_path, flags, [])) as service:
        expected = await answers(service.client, REQUESTS[:4])
        since = len(service.events)
        async with load_on(service, expected, requests=REQUESTS[:4]) as load:
            for _ in range(3):
                for kind in (told, "joined"):
                    heard = await service.until_said({kind}, since, DONE_SECONDS)
                    assert kind in {event.kind for event in service.events[since:heard]}, service.story()
                    since = heard
            await more_tokens(load, 40)
        assert await service.stop() == 0
        assert service.left() == [] and not list((tmp_path / "store").rglob("*"))
