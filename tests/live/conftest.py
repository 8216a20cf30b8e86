"""What the tests with real processes share: compiled programs, so that only the first process compiles."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, shared by all servers and workers of this session."""
    return tmp_path_factory.mktemp("programs")
