"""The programs in docs/examples, against stand-ins of what they call; the whole contract takes a minute."""

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from linters import SHELLCHECK
from provider_contract import FLEET, Case, ProviderContract

from spotjax.errors import OutOfCapacity, ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.providers.command import CommandConfig, CommandOffer, CommandProvider
from spotjax.fleet.providers.provider import FleetIdentity, MachineState, Offer, Provider

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[2] / "docs" / "examples"


class World:
    """The stand-ins' state, and providers that call an example."""

    def __init__(self, directory: Path, example: str, offers: tuple[CommandOffer, ...], **environment: str) -> None:
        self._example, self._offers = str(EXAMPLES / example), offers
        self._file = directory / "state.json"
        self._file.write_text(json.dumps({"jobs": {}, "instances": {}}))
        (directory / "bin").mkdir()
        for name in ("sbatch", "squeue", "scancel", "aws", "spotjax"):
            path = directory / "bin" / name
            path.write_text(f"#!{sys.executable} -SI\n{(HERE / 'stub_programs.py').read_text()}")
            path.chmod(0o755)
        self._environment = {
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "STUB_STATE": str(self._file), **environment,
        }  # fmt: skip

    def open(self, fleet: FleetIdentity = FLEET) -> CommandProvider:
        config = CommandConfig(command=(self._example,), offers=self._offers, poll_seconds=0.2)
        return CommandProvider(config, fleet, self._environment)

    @property
    def state(self) -> Any:
        return json.loads(self._file.read_text())

    def change(self, **values: object) -> Callable[[], Awaitable[None]]:
        async def change() -> None:
            self._file.write_text(json.dumps(self.state | values))

        return change

    def case(self, **settings: Any) -> Case:
        async def opened(fleet: FleetIdentity) -> Provider:
            return self.open(fleet)

        return Case(opened, **settings)


@pytest.mark.slow
class TestSlurm(ProviderContract):
    """Jobs wait for nodes; what has ended is gone."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        offers = (CommandOffer(type="gpu:a100:4", zone="spot", price=3.0),)
        world = World(tmp_path, "slurm-machines", offers)
        error = {
            "QOSMaxSubmitJobPerUserLimit": QuotaExceeded,
            "Batch job submission failed: Unable to contact slurm controller (connect failure)": ProviderUnavailable,
            "Batch job submission failed: Socket timed out on send/recv operation": ProviderUnavailable,
            "invalid partition specified: spot": ProviderRefused,
        }
        return world.case(
            exhaust=world.change(nodes=1), refresh=world.change(nodes=9), waits=True,
            fails={why: (kind, world.change(fails=why)) for why, kind in error.items()},
            lose_answer=world.change(fails="Socket timed out on send/recv operation", loses=True),
            existing=lambda: len(world.state["jobs"]),
        )  # fmt: skip


@pytest.mark.slow
class TestAws(ProviderContract):
    """Instances come at once, or not at all."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        offers = (CommandOffer(type="g6.xlarge", zone="eu-west-1a", price=0.3),)
        world = World(tmp_path, "aws-machines", offers, AWS_REGION="eu-west-1", LAUNCH_TEMPLATE="worker")
        error = {
            "(InsufficientInstanceCapacity)": OutOfCapacity,
            "(MaxSpotInstanceCountExceeded)": QuotaExceeded,
            "(RequestLimitExceeded)": ProviderUnavailable,
            'Could not connect to the endpoint URL: "https://ec2.eu-west-1.amazonaws.com/"': ProviderUnavailable,
            "(UnauthorizedOperation)": ProviderRefused,
        }
        return world.case(
            exhaust=world.change(fails="(InsufficientInstanceCapacity)"),
            fails={why: (kind, world.change(fails=why)) for why, kind in error.items()},
            lose_answer=world.change(fails="(InternalError)", loses=True),
            existing=lambda: sum(i["state"] != "terminated" for i in world.state["instances"].values()),
        )  # fmt: skip


async def test_a_job_has_the_settings_of_its_worker_and_the_quality_of_service_of_its_price_class(
    tmp_path: Path,
) -> None:
    offers = tuple(
        CommandOffer(type="gpu:1", zone="p", price_class=p, price=1)  # type: ignore[arg-type]
        for p in ("spot", "on_demand")
    )
    world = World(tmp_path, "slurm-machines", offers, SPOT_QOS="cheap", WORKER_PYTHON="/shared/python")
    provider = world.open()
    for name, offer in zip(("a", "b"), await provider.offers(), strict=True):
        machine = await provider.request(name, offer)
        assert machine.detail.startswith("job 10")
    jobs = list(world.state["jobs"].values())
    assert [(job["name"], job["qos"]) for job in jobs] == [("contract/a", "cheap"), ("contract/b", "normal")]
    assert jobs[1]["exported"] == {
        "SPOTJAX_FLEET": "contract", "SPOTJAX_JOIN": "127.0.0.1:1", "SPOTJAX_NAME": "b", "SPOTJAX_TYPE": "gpu:1",
        "SPOTJAX_ZONE": "p", "SPOTJAX_PRICE_CLASS": "on_demand",
    }  # fmt: skip
    assert world.state["bootstrap"] == "bootstrap slurm --join 127.0.0.1:1 --python /shared/python"
    assert [m.created for m in await provider.list()] == [1795341600.0] * 2
    await provider.release("a")
    assert "a" not in {m.name for m in await provider.list() if m.state is MachineState.RUNNING}
    await world.change(fails="QOSMaxSubmitJobPerUserLimit")()
    with pytest.raises(QuotaExceeded, match="QOSMax"):
        await provider.request("c", offers[0].offer)
    await world.change(unreachable=True)()
    with pytest.raises(ProviderUnavailable, match="Unable to contact slurm controller"):
        await provider.list()


async def test_an_instance_that_is_asked_for_again_after_it_ended_is_another_one(tmp_path: Path) -> None:
    offers = tuple(
        CommandOffer(type="g6.xlarge", zone="eu-west-1a", price_class=p, price=1)  # type: ignore[arg-type]
        for p in ("spot", "on_demand")
    )
    world = World(tmp_path, "aws-machines", offers, AWS_REGION="eu-west-1", LAUNCH_TEMPLATE="worker")
    provider = world.open()
    spot, demand = await provider.offers()
    await world.change(fails="(InternalError)", loses=True)()
    with pytest.raises(ProviderUnavailable, match="InternalError"):
        await provider.request("a", spot)
    for offer in (spot, demand, spot):
        await provider.request("a", offer)
        await provider.release("a")
        await world.case().until(provider, lambda m: not m)
    instances = list(world.state["instances"].values())
    assert len(instances) == 3 == len({instance["token"] for instance in instances})
    assert [bool(instance["market"]) for instance in instances] == [True, False, True]
    assert instances[0]["template"] == "LaunchTemplateName=worker"
    assert world.state["bootstrap"] == "bootstrap aws --join 127.0.0.1:1 --name a --price-class spot"
    with pytest.raises(ProviderRefused, match="there is no"):
        await provider.request("a", Offer("g6.xlarge", "eu-west-1b", "spot", 1.0))
    await world.change(unreachable=True)()
    with pytest.raises(ProviderUnavailable, match="Could not connect to the endpoint"):
        await provider.release("a")


def test_shellcheck_has_nothing_to_say_of_the_examples_and_of_the_program_for_tests() -> None:
    scripts = [str(path) for path in EXAMPLES.iterdir()] + [str(HERE / "machines_program.sh")]
    found = subprocess.run([SHELLCHECK, "--severity=style", *scripts], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
