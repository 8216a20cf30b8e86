"""A process that records is killed at random moments, many times: all that it was told is there, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from log_cases import contents, grown, new_request

from spotjax.engine.commit_log import RecordedRequest

CHILD = Path(__file__).with_name("log_child.py")


@dataclass
class Told:
    """What the killed processes were told, all together.

    Attributes:
      tokens: that each sequence of each request has at least.
      forgetting: requests that may be gone or still be there.
      gone: requests that must not come back.
      checked: tokens that were compared with what they must be.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    forgetting: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    checked: int = 0

    def hear(self, what: str, *words: str) -> None:
        """One line of a process."""
        if what == "accepted":
            self.tokens[words[0]] = [0] * int(words[1])
        elif what == "token" and words[0] not in self.forgetting:
            lengths, choice, length = self.tokens[words[0]], int(words[1]), int(words[2])
            assert length > lengths[choice]  # in order, and none twice
            lengths[choice] = length
        elif what == "forgets":
            del self.tokens[words[0]]
            self.forgetting.add(words[0])

    def check(self, held: dict[str, RecordedRequest]) -> None:
        """Everything that was told is there, and what more is there is what was asked for."""
        assert self.tokens.keys() <= held.keys()
        assert not self.gone & held.keys()
        self.gone |= self.forgetting - held.keys()
        self.forgetting.clear()
        for name, request in held.items():
            begun = new_request(name, len(request.states))
            assert (request.request, request.key) == (begun.request, begun.key)
            least = self.tokens.get(name, [0] * len(request.states))
            for state, start, length in zip(request.states, begun.states, least, strict=True):
                assert len(state.tokens) >= length
                assert state == grown(start, len(state.tokens), state.finish)
                self.checked += len(state.tokens)
            self.tokens[name] = [len(state.tokens) for state in request.states]


@pytest.mark.parametrize("durability", ["step", "interval"])
async def test_everything_that_was_told_is_there_after_a_kill_at_any_moment(tmp_path: Path, durability: str) -> None:
    chance, told = random.Random(7), Told()
    environment = {**os.environ, "PYTHONPATH": str(CHILD.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-W", "error", CHILD], text=True, env=environment, **pipes) as server:
        assert server.stdin
        assert server.stdout
        for seed in range(60):
            print(tmp_path, durability, seed, file=server.stdin, flush=True)
            process = int(server.stdout.readline().split()[1])
            if chance.random() < 0.9:  # else it may not even have opened the log
                for _ in range(chance.choice([1, 2, 10, 100, 1000])):
                    told.hear(*server.stdout.readline().split())
            os.kill(process, signal.SIGKILL)
            while (line := server.stdout.readline()) != "killed\n":
                assert not line.startswith("failed")
                told.hear(*line.split())
            told.check(await contents(tmp_path))
    assert told.checked > 2_000
    assert told.gone
