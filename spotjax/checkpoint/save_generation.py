"""``python -m spotjax.checkpoint.save_generation LOG CHECKPOINT``: saves what a commit log has as an Orbax checkpoint.

A process of its own, because Orbax needs jax and the controller is to have none. The log may be in use: it is read as
it is at one moment. Prints ``Done`` as JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from spotjax.engine.log_inspection import read_log
from spotjax.errors import CommitLogError, SpotjaxError


class Done(msgspec.Struct, frozen=True):
    """What was saved.

    Attributes:
      requests: how many.
    """

    requests: int


def main(argv: Sequence[str]) -> int:
    """Runs it; returns the exit code: 0, or 1 with one line on standard error."""
    log, checkpoint = argv
    os.umask(0o077)  # what was asked for is private, here as in the log
    os.environ["JAX_PLATFORMS"] = "cpu"  # Orbax starts jax, which would take hold of accelerators
    from spotjax.checkpoint.generation import save_generation

    try:
        contents = read_log(Path(log))
        if contents.service is None or contents.damage:
            raise CommitLogError(f"the commit log {log} is damaged: {(*contents.damage, 'it is empty')[0]}")
        requests = [stored.recorded for stored in contents.requests]
        save_generation(checkpoint, requests, contents.service.identity, contents.service.epoch)
    except SpotjaxError as problem:
        print(problem, file=sys.stderr)
        return 1
    print(msgspec.json.encode(Done(len(requests))).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
