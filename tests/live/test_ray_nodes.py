"""A controller takes nodes of a Ray cluster on this machine for its workers; they are killed and drained under load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_cases import CONTROLLER, DONE_SECONDS, REQUESTS, load_on, more_tokens

from spotjax.tools.load import answers
from spotjax.tools.service import Service, ready, running

sys.path.append(str(Path(__file__).parents[1] / "fleet" / "providers"))
from ray_cases import RayNodes, is_on, process_of, ray_nodes

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
FILE = """
[provider]
kind = "ray"
address = "{address}"
poll_seconds = 0.2
worker = {{ devices_per_instance = 2, compilation_cache = "{programs}", parameter_store = "off", notices = "none" }}

[[provider.offers]]
type = "node"
price = 1.0

[capacity]
fleet = "onray"
least = 2
idle = 2
most = 2
on_demand = "never"
cost_per_hour = 20.0
action_seconds = 0.1
retry_seconds = 0.5
"""


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    """A head without room for workers."""
    with ray_nodes() as cluster:
        yield cluster


async def test_nodes_of_a_ray_cluster_die_and_are_drained_and_no_token_is_lost(
    nodes: RayNodes, programs: Path, tmp_path: Path
) -> None:
    """A controller that dies finds its machines again; those that are gone are replaced on other nodes."""
    places = [nodes.add() for _ in range(3)]
    path = tmp_path / "capacity.toml"
    path.write_text(FILE.format(address=nodes.address, programs=programs))
    async with running(Service(tmp_path, (*CONTROLLER, "--capacity", str(path)), (), patience=DONE_SECONDS)) as fleet:

        async def two() -> dict[str, int]:
            """The members, when there are two, with the number of the node that each one is on."""
            await fleet.until("two members", lambda status: len(ready(status)) == 2 and status.ready)
            found = {}
            for name in ready(await fleet.client.status()):
                process = process_of(f"--name={name}")
                assert process is not None
                (found[name],) = [number for number, place in enumerate(places) if is_on(process, place)]
            assert len(set(found.values())) == 2, "each is alone on its node"
            return found

        before = await two()
        expected = await answers(fleet.client, REQUESTS)
        async with load_on(fleet, expected) as load:
            name, place = next(iter(before.items()))
            nodes.kill(places[place])
            await fleet.until_gone([name])
            await more_tokens(load, 40)
            after = await two()
            assert place not in after.values()
            await more_tokens(load, 40)

            places.append(nodes.add())
            since = len(fleet.events)
            name, place = next(iter(after.items()))
            nodes.drain(places[place], 20.0)
            await fleet.until_said({"notice"}, since, DONE_SECONDS)
            await fleet.until_gone([name])
            nodes.kill(places[place])
            drained = await two()
            assert place not in drained.values()
            await more_tokens(load, 40)

            await fleet.kill_server()
            fleet.start_server()
            assert await two() == drained, "nothing is rented twice, and nothing given back"
            await more_tokens(load, 40)
