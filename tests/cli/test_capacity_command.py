"""``spotjax capacity`` says what would be rented, and rents nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spotjax import cli
from spotjax.commands.capacity_views import capacity_view
from spotjax.fleet.status import CapacityStatus, FleetEvent, MachineStatus

FILE = """
[provider]
kind = "local"
[[provider.offers]]
type = "small"
price = 0.25
[[provider.offers]]
type = "small"
price_class = "on_demand"
price = 1.0
[capacity]
fleet = "chat"
most = 4
cost_per_hour = 2.6
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "capacity.toml"
    path.write_text(FILE)
    return str(path)


def test_offers_and_first_actions_are_printed(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capacity", file, "--instances", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "offers of local" in said and "wanted: 2 instances" in said
    assert "would request chat-0 as small as spot" in said and "would request chat-1 as small as spot" in said
    assert "would request chat-2 as small as on_demand" in said
    assert "2.50 of 2.60 USD per hour" in said and said.endswith("nothing was rented")


def test_what_a_cap_forbids_is_said(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capacity", file, "--instances", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "would wait: no on-demand machine fits under the cap" in said


def test_the_same_as_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capacity", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wanted"] == 1 and [action["machine"] for action in found["actions"]] == ["chat-0", "chat-1"]
    assert found["actions"][0]["offer"]["price"] == 0.25 and found["cost_per_hour"] == 1.25


@pytest.mark.parametrize("instances", ["5", "-1"])
def test_more_than_the_file_allows_is_refused(file: str, instances: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capacity", file, "--instances", instances]) == 2
    assert "--instances" in capsys.readouterr().err


def test_status_shows_what_is_wanted_rented_spent_and_done(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    machine = MachineStatus("chat-0", "small", "a", "on_demand", 1.0, "running", "up")
    capacity = CapacityStatus(
        "gce", 3, "2 sequences/s", "no spot machine is to be had", 1.0, 2.5, 4.2, 0.0, (machine,),
        (FleetEvent(0.0, "requested", 1, "chat-0 was asked for"),),
    )  # fmt: skip
    Console(width=200).print(capacity_view(capacity))
    said = capsys.readouterr().out
    for part in ("machines of gce", "chat-0", "on-demand", "wanted: 3 (2 sequences/s)", "waiting: no spot machine",
                 "1.00 of 2.50 USD per hour, 4.20 USD today", "requested: chat-0 was asked for"):  # fmt: skip
        assert part in said
