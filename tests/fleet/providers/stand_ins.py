"""Stand-ins for workers that providers start as processes on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from spotjax.config import ServeConfig

WORKER = "import pathlib, signal, sys; pathlib.Path({file!r}).write_text(' '.join(sys.argv[1:])); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WORKER


def command(directory: Path, program: str = WORKER) -> Callable[[ServeConfig, str, str], list[str]]:
    """What starts a program of that name, whose ``{file}`` is one of the directory with the machine's name."""

    def starting(_: ServeConfig, __: str, name: str) -> list[str]:
        return [sys.executable, "-S", "-c", program.format(file=str(directory / name))]

    return starting
