"""Processes that record requests until they are killed, and say what they were told and are about to forget."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from log_cases import grown, new_request, opened, recorded, small_limits, told

from spotjax.engine.request import FinishReason, RequestState

OUT = 1
"""A pipe; what is written to it at once is shorter than what it takes whole."""


async def record(directory: Path, durability: str, seed: int) -> None:
    """Goes on with what is in the log, and begins, extends, ends and forgets requests until it is killed."""
    chance = random.Random(seed)
    log = opened(directory, durability)
    held = {name: list(request.states) for name, request in recorded(log).items()}
    log.on_change = lambda: os._exit(1)  # nothing is wrong with this disk
    os.write(OUT, b"opened\n")

    def tell(states: list[RequestState]) -> None:
        lines = [f"token {state.request_id} {state.choice} {len(state.tokens)}\n" for state in states]
        os.write(OUT, "".join(lines).encode())

    async def accept(number: int) -> None:
        request = new_request(f"{seed}-{number}", chance.choice([1, 2]))
        name = request.request.request_id
        await log.accept(request.request, request.states, request.key)
        os.write(OUT, f"accepted {name} {len(request.states)}\n".encode())
        held[name] = list(request.states)

    number = 0
    while True:
        ended = [name for name, states in held.items() if all(state.finish for state in states)]
        if len(held) < 8:
            number += 1
            waiting = asyncio.create_task(accept(number))
            if chance.random() < 0.5:
                await waiting
        if len(ended) > 3:
            del held[ended[0]]
            os.write(OUT, f"forgets {ended[0]}\n".encode())
            log.forget(ended[0])
        step = []
        for states in held.values():
            for choice, state in enumerate(states):
                if state.finish is None and chance.random() < 0.8:
                    reason = FinishReason.STOP if chance.random() < 0.03 else None
                    states[choice] = grown(state, 1, reason)
                    step.append(states[choice])
        log.append(step, lambda step=step: tell(step))
        if chance.random() < 0.3:
            await told(log, [])
        await asyncio.sleep(0)


def serve() -> None:
    """Starts a process for each line of ``directory durability seed`` and says when it is gone."""
    for line in sys.stdin:
        directory, durability, seed = line.split()
        if (child := os.fork()) == 0:
            os.write(OUT, f"process {os.getpid()}\n".encode())
            with small_limits(rows=32, piece=8, wal=32 << 10):
                asyncio.run(record(Path(directory), durability, int(seed)))
        _, status = os.waitpid(child, 0)
        os.write(OUT, b"killed\n" if os.WTERMSIG(status) == signal.SIGKILL else f"failed {status}\n".encode())


if __name__ == "__main__":
    serve()
