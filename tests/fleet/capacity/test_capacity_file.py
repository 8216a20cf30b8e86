"""The [capacity] table: what it may say, and what is refused with the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotjax.errors import ConfigError
from spotjax.fleet.capacity.file import read

PROVIDER = '[provider]\nkind = "local"\n'


def written(directory: Path, capacity: str) -> Path:
    path = directory / "capacity.toml"
    path.write_text(f"{PROVIDER}[capacity]\n{capacity}")
    return path


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    provider, settings = read(written(tmp_path, "most = 4\ncost_per_hour = 2.5\n"))
    assert provider == {"kind": "local"}
    assert (settings.most, settings.cost_per_hour, settings.least, settings.on_demand) == (4, 2.5, 1, "fallback")


@pytest.mark.parametrize(
    ("capacity", "problem"),
    [
        ("cost_per_hour = 1.0", "most"),
        ("most = 4", "a cap on spending is needed"),
        ("most = 4\ncost_per_hour = 1.0\nleats = 2", "leats"),
        ("most = 4\ncost_per_hour = -1.0", "cost_per_hour"),
        ("most = 0\ncost_per_hour = 1.0", "most"),
        ("most = 4\ncost_per_hour = 1.0\nleast = 5", r"least \(5\) must be at most most \(4\)"),
        ("most = 4\ncost_per_hour = 1.0\nidle = 2", r"idle \(2\) must be at most least \(1\)"),
        ("most = 4\ncost_per_hour = 1.0\non_demand = 'sometimes'", "on_demand"),
        ("most = 4\ncost_per_hour = 1.0\non_demand = 'never'\nleast_on_demand = 1", "no meaning"),
        ("most = 4\ncost_per_hour = 1.0\nutilisation = 1.5", "utilisation"),
        ("most = 4\ncost_per_hour = 1.0\nretry_seconds = 5000.0", "most_retry_seconds"),
        ("most = 4\ncost_per_hour = 1.0\nfleet = 'My Fleet'", "fleet"),
        ("most = ", "as TOML"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, capacity: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(written(tmp_path, capacity))


def test_both_tables_are_needed_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "capacity.toml"
    for text in ("[capacity]\nmost = 1\n", f"{PROVIDER}[capacity]\nmost = 1\n[more]\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"must have the tables \[provider\] and \[capacity\]"):
            read(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "missing.toml")
