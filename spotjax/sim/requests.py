"""What became of every request of a simulation so far. Columns, because a simulated day has millions of rows."""

from __future__ import annotations

from math import inf, nan

from spotjax.sim.workload import RequestTrace


class RequestBook:
    """The requests by number, in order of arrival. Replicas write into it.

    Attributes:
      arrival, prompt, output: see ``RequestTrace``; lists, which Python reads faster than arrays.
      generated: tokens that were committed when the request last left a replica; 0 when it began again from nothing.
      first_token: seconds at which its first token came, nan before.
      last_token: seconds at which it got its latest token when it last left a replica; nan before it has one.
      finish: seconds at which its last token came, nan before.
      largest_gap: the longest that a client waited between two tokens, in seconds.
      restarts: times that its tokens were thrown away and generated again.
      recomputed: positions whose KV was there once and was computed again.
      lost: numbers of the requests that the system gave up, if it does that: nobody works on them any more.
    """

    __slots__ = (
        "arrival", "finish", "first_token", "generated", "largest_gap", "last_token", "lost", "output", "prompt",
        "recomputed", "restarts",
    )  # fmt: skip

    def __init__(self, trace: RequestTrace) -> None:
        count = len(trace)
        self.arrival: list[float] = trace.arrival.tolist()
        self.prompt: list[int] = trace.prompt.tolist()
        self.output: list[int] = trace.output.tolist()
        self.generated = [0] * count
        self.first_token = [nan] * count
        self.last_token = [nan] * count
        self.finish = [nan] * count
        self.largest_gap = [0.0] * count
        self.restarts = [0] * count
        self.recomputed = [0] * count
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.arrival)

    def restart(self, request: int) -> None:
        """Its tokens are lost with its replica: it begins again from nothing, as its client does."""
        if self.generated[request]:
            self.recomputed[request] += self.prompt[request] + self.generated[request] - 1
        self.generated[request] = 0
        self.restarts[request] += 1

    def wait(self, request: int, token_at: float, before: float = inf) -> None:
        """A token came at ``token_at`` after one at ``before`` or, by default, at ``last_token``."""
        since = self.last_token[request] if before == inf else before
        if token_at - since > self.largest_gap[request]:  # False while there was no token: nan
            self.largest_gap[request] = token_at - since
