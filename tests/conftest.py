"""Eight virtual CPU devices and strict arithmetic for every test that uses jax. Tests without jax do not pay for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
assert "jax" not in sys.modules, "jax must not be imported before its configuration is set"

settings.register_profile("spotjax", deadline=None)  # correctness is tested; a loaded machine is slow
settings.load_profile("spotjax")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that are not told where write their commit logs here, those in processes of their own, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, shared by all servers and workers of this run and all its processes: each is compiled once."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # of all processes' directories
    return directory / "programs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Live tests take longest and begin first."""
    items.sort(key=lambda item: "live" not in item.path.parts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run tests, those of a file share one, and with it their servers; live tests share one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "live" if "tests/live/" in nodeid else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
