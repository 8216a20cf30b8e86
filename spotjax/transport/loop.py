"""The event loop that the data plane runs fastest on: uvloop where there is one, else asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:  # Windows
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
else:
    loop_factory = uvloop.new_event_loop

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run`` on the fastest loop."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)
