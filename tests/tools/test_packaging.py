"""What is installed is what is here: a wheel has every package of this checkout."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_part_of_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = set()
    for package, directory in setuptools["package-dir"].items():
        for file in (ROOT / directory).rglob("__init__.py"):
            there.add(".".join([package, *file.parent.relative_to(ROOT / directory).parts]))
    assert there == set(setuptools["packages"])
