"""``spotjax serve`` for a worker whose devices take their time over a step and leave the processors alone meanwhile.

As accelerators do. Devices that are these processors would take all of them for as long as requests run, from whatever
else starts, waits and is tested on the machine.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax

from spotjax.runtime.stage import Stage
from spotjax.serve import main

STEP_SECONDS = 0.01
"""Of every stage."""


def slow(run: Any) -> Any:
    """The same after ``STEP_SECONDS``."""

    def run_slowly(*arguments: Any) -> jax.Array:
        time.sleep(STEP_SECONDS)
        result: jax.Array = run(*arguments)
        return result

    return run_slowly


if __name__ == "__main__":
    Stage.run = slow(Stage.run)  # type: ignore[method-assign]
    sys.exit(main())
