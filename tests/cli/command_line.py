"""What the tests of the commands share: the command line, run on a thread against a live server."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from spotjax import cli
from spotjax.api.server import ApiServer
from spotjax.testing.scripted_service import ScriptedService


@dataclass
class CommandLine:
    """Runs ``spotjax ... --server ADDRESS`` with the output captured."""

    service: ScriptedService
    server: ApiServer
    address: str
    capture: pytest.CaptureFixture[str]

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        code = await asyncio.to_thread(cli.main, [*arguments, "--server", self.address])
        return code, *self.capture.readouterr()


async def until(condition: Callable[[], object]) -> None:
    """Waits until something that happens in the background is done; pytest's timeout ends a vain wait."""
    while not condition():
        await asyncio.sleep(0.002)
