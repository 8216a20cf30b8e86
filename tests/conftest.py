"""Eight virtual CPU devices and strict arithmetic for every test that uses jax. Tests without jax do not pay for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` tests of a file share a process, and with it their servers; live tests share one."""
    for item in items:
        live = "live" in item.path.parts
        item.add_marker(pytest.mark.xdist_group("live" if live else str(item.path)))
