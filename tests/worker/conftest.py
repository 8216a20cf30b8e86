"""A worker on real stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from worker_cases import Case


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    case = Case(tmp_path)
    yield case
    await asyncio.to_thread(case.worker.clear)
    case.store.close()
