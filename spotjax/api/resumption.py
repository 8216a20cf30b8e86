"""How a client sees one request through, however often its connection breaks: each token exactly once.

Owns what was seen and which call comes next; how long to wait for it is ``patience.py``. No I/O: ``spotjax.client`` and
``spotjax.async_client`` make the calls.

A request is sent with ``Generate`` until a server has said that it accepted it, then taken up with ``Resume``. When
``Generate`` breaks before the answer, the request may or may not be accepted. It is sent again under its id: a server
that has it refuses with ``RequestExists``, and the client takes up what it had started.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from spotjax.api.errors import Unavailable, Unreachable
from spotjax.api.generation_messages import delta_from
from spotjax.api.patience import LONGEST_WAIT, Patience
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.requests import built
from spotjax.engine.generation import Delta
from spotjax.errors import RequestExists, SpotjaxError, UnknownRequest


@dataclass(slots=True)
class Progress:
    """What a client has seen of one request.

    Attributes:
      request_id: of the request.
      offsets: tokens seen of every choice.
      finished: choices that ended.
    """

    request_id: str
    offsets: list[int]
    finished: set[int] = field(default_factory=set)

    def take(self, response: pb.GenerateResponse) -> Delta | None:
        """The piece of output in a response, which is seen from here on; None if its choice had ended before.

        Raises:
          SpotjaxError: it does not go on where the last one of its choice ended.
        """
        delta = delta_from(response)
        if delta.choice >= len(self.offsets) or delta.offset != self.offsets[delta.choice]:
            raise SpotjaxError(
                f"request {self.request_id}: choice {delta.choice} goes on at token {delta.offset}, "
                f"but of its choices {self.offsets} tokens were seen"
            )
        if delta.choice in self.finished:  # Resume says again how each choice ended
            return None
        self.offsets[delta.choice] += len(delta.tokens)
        if delta.finish is not None:
            self.finished.add(delta.choice)
        return delta

    @property
    def complete(self) -> bool:
        """Whether all choices ended."""
        return len(self.finished) == len(self.offsets)


class Pursuit:
    """The calls that it takes to see a request to its end, and what their failures say about where it is."""

    def __init__(self, progress: Progress, generate: pb.GenerateRequest | None, patience: float, server: str) -> None:
        """Before the first call.

        Args:
          progress: what was seen so far.
          generate: sends the request; None if it was accepted before, from whomever, and is only taken up.
          patience: seconds, see ``Patience``.
          server: its address, for messages.
        """
        self.progress = progress
        self._generate, self._server = generate, server
        self._patience = Patience(patience, progress.request_id)
        self._accepted = False  # the server has said so
        self._taken = generate is None  # a server has it, or says that it has: take it up
        self._sent = self._sent_before = False  # calls of ours may have brought it to a server; before the current one
        self._opened: float | None = None  # when the current call was answered

    @property
    def abandoned(self) -> bool:
        """If nobody goes on from here: whether a server may be left with a request that we sent."""
        return self._sent and not self.progress.complete

    def next_call(self) -> tuple[Literal["Generate", "Resume"], pb.GenerateRequest | pb.ResumeRequest]:
        """The method to call and what to ask it, which the caller is about to do."""
        self._opened = None
        if self._generate is not None and not self._taken:
            self._sent_before, self._sent = self._sent, True
            return "Generate", self._generate
        progress = self.progress
        return "Resume", built(pb.ResumeRequest, request_id=progress.request_id, offsets=progress.offsets)

    def opened(self) -> None:
        """The server has taken the current call: output will follow."""
        self._opened = time.monotonic()
        seen = ", ".join(map(str, self.progress.offsets))
        self._patience.tell_end(f"resumed at token {seen}" if self._taken else "the server is back")
        if self._generate is None or not self._taken:
            self._accepted = self._taken = True

    def take(self, response: pb.GenerateResponse) -> Delta | None:
        """See ``Progress.take``."""
        self._accepted = True
        delta = self.progress.take(response)
        if delta is not None:
            self._patience.renew()
        return delta

    def wait_after(self, error: Exception) -> float:
        """Seconds to wait before the next call, after one that failed; raises the error if there is to be none."""
        if self._opened is not None and time.monotonic() - self._opened > LONGEST_WAIT:
            self._patience.renew()  # requests may wait long for a token, and break more than once while they do
        if not self._taken and refused(error):
            self._sent = self._sent_before
        if isinstance(error, Unavailable):
            return self._patience.wait_after(Unreachable(str(error)) if self._accepted else error)
        if isinstance(error, UnknownRequest) and self._accepted:
            raise forgotten(self.progress, self._server)
        if isinstance(error, UnknownRequest) and self._taken and self._generate is not None:
            self._taken = False  # it was taken, but never on record
            return self._patience.wait_after(error)
        if isinstance(error, RequestExists) and self._sent_before:
            self._taken = True  # by a call of ours whose answer was lost
            return 0.0
        raise error


def refused(error: Exception) -> bool:
    """Whether a server answered ``Generate`` with this error instead of accepting the request."""
    return isinstance(error, SpotjaxError) and type(error) not in (SpotjaxError, Unreachable)


def forgotten(progress: Progress, server: str) -> UnknownRequest:
    """The error for a request that was accepted and is not there any more."""
    return UnknownRequest(
        f"{server} does not know request {progress.request_id!r} any more, of which {sum(progress.offsets)} tokens "
        "were seen: it was started again without the commit log that has the request, or the request ended longer ago "
        "than finished ones are kept; send it again to start from its beginning"
    )
