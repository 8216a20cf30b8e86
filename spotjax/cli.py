"""The ``spotjax`` command: which commands there are, and how errors end them. What they do is in ``commands``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from spotjax import __version__
from spotjax.commands import (
    bench,
    bootstrap,
    capacity,
    checkpoint,
    cold_restart,
    convert,
    fetch,
    fleet,
    generate,
    health,
    keys,
    plan,
    profile,
    serve,
    simulate,
)
from spotjax.errors import ConfigError, SpotjaxError

EXAMPLES = """\
examples:
  spotjax serve                                     serve the small model that comes with Spotjax
  spotjax generate "Once upon a time" --max-tokens 64 --temperature 0
  spotjax status --watch                            instances, mesh and requests, live
  spotjax preempt instance-1 --grace 5                     take an instance away, as a cloud would
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; each command's arguments carry the function that runs it as ``run``."""
    top = argparse.ArgumentParser(
        prog="spotjax",
        description="Serve language models on machines that can be taken away.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"spotjax {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        serve,
        health,
        keys,
        generate,
        fleet,
        capacity,
        fetch,
        convert,
        checkpoint,
        cold_restart,
        plan,
        profile,
        simulate,
        bench,
        bootstrap,
    ):
        module.add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SpotjaxError, TimeoutError) as error:
        print(f"spotjax: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
