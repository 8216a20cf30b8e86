"""Survives a preemption before your eyes: ``python -m spotjax.tools.demo``, or ``make demo``.

Starts a server on the embedded default (the shipped model on four virtual instances), generates a text undisturbed,
then generates it again and takes an instance away in the middle. Prints what moved, how long the pause was, and
whether both texts are the same. Exits 1 if they are not. ``--svg FILE`` keeps a picture of it, as the README shows.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from spotjax.client import SpotjaxClient
from spotjax.commands.views import reconfiguration_text, status_view
from spotjax.fleet.status import Reconfiguration

START_SECONDS = 300.0
"""A first start compiles; later ones take seconds."""
console = Console(highlight=False, record=True)


@dataclass
class Generation:
    """One streamed text.

    Attributes:
      text: all of it.
      tokens: token ids.
      times: monotonic seconds at which each delta arrived.
      report: what the preemption in the middle did, if there was one.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    report: Reconfiguration | None = None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one delta and the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@contextmanager
def running_server(model: str) -> Iterator[str]:
    """A server process of its own on a free port; yields its address."""
    command = [
        sys.executable,
        "-m",
        "spotjax.serve",
        "--listen",
        "127.0.0.1:0",
        "--http",
        "off",
        "--instances",
        "4",
        "--model",
        model,
    ]
    with (
        tempfile.TemporaryDirectory(prefix="spotjax-demo-") as commits,
        subprocess.Popen(
            [*command, "--commit-log", commits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdout is not None and server.stderr is not None
        lines: queue.Queue[str | None] = queue.Queue()
        log: list[str] = []
        threading.Thread(target=_forward, args=(server.stdout, lines), daemon=True).start()
        threading.Thread(target=lambda pipe: log.extend(pipe), args=(server.stderr,), daemon=True).start()
        try:
            yield _address(lines, log)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _forward(pipe: Iterator[str], lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _address(lines: queue.Queue[str | None], log: list[str]) -> str:
    """Waits for the line that says where the server listens."""
    deadline = time.monotonic() + START_SECONDS
    while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
        if " is serving " in line:
            console.print(f"[dim]{escape(line.strip())}[/dim]")
            return line.split(" on ", 1)[1].split()[0]
    raise SystemExit("the server did not start:\n" + "".join(log[-20:]))


def generate(server: str, prompt: str, tokens: int, preempt: tuple[str, float] | None) -> Generation:
    """Streams a text; with ``preempt`` takes that instance away, with that grace, a third of the way through."""
    done = Generation()
    drill: threading.Thread | None = None
    with SpotjaxClient(server) as client, SpotjaxClient(server) as operator:
        console.print(f"[bold]{escape(prompt)}[/bold]", end="")
        for delta in client.generate(prompt, max_tokens=tokens, temperature=0.8, seed=1, ignore_eos=True):
            done.times.append(time.monotonic())
            done.tokens += delta.tokens
            done.text += delta.text
            console.print(escape(delta.text), end="", style="green" if done.report else None)
            if preempt is not None and drill is None and len(done.tokens) >= tokens // 3:

                def take(instance: str = preempt[0], grace: float = preempt[1]) -> None:
                    done.report = operator.preempt(instance, grace)

                console.print(f"[bold red]⚡{preempt[0]} is taken away⚡[/bold red]", end="")
                drill = threading.Thread(target=take)
                drill.start()
        if drill is not None:
            drill.join()
        console.print()
    return done


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompt", default="ROMEO.\nBut soft, what light through yonder window breaks?\n")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--instance", default="instance-1", help="the one that is taken away")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds of notice; 0 takes it unannounced")
    parser.add_argument("--svg", type=Path, help="file for a picture of what was printed")
    arguments = parser.parse_args()
    console.rule("starting a server (the first time it compiles for a while)")
    with running_server(arguments.model) as server:
        with SpotjaxClient(server) as client:
            console.print(status_view(client.status()))
        console.rule("undisturbed")
        calm = generate(server, arguments.prompt, arguments.tokens, None)
        console.rule(f"again, and {arguments.instance} is taken away with {arguments.grace:g} s notice")
        disturbed = generate(server, arguments.prompt, arguments.tokens, (arguments.instance, arguments.grace))
        console.rule("what happened")
        assert disturbed.report is not None
        console.print(reconfiguration_text(disturbed.report))
        with SpotjaxClient(server) as client:
            console.print(status_view(client.status()))
    median = statistics.median(disturbed.gaps)
    same = calm.tokens == disturbed.tokens and calm.text == disturbed.text
    console.print(
        f"largest gap between two tokens: {1e3 * max(disturbed.gaps):.0f} ms, median {1e3 * median:.1f} ms\n"
        f"{len(disturbed.tokens)} tokens, lost 0, repeated 0: the text equals the undisturbed one"
        if same
        else "[bold red]the texts differ[/bold red]"
    )
    if arguments.svg:
        console.save_svg(str(arguments.svg), title="spotjax: a preemption is survived")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
