"""How a client takes a broken stream up again: what it has seen, what to ask for, how long to wait.

Pure; the connections are in ``spotjax.client``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from spotjax.api.generation_messages import delta_from
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.requests import built
from spotjax.engine.generation import Delta
from spotjax.errors import SpotjaxError

FIRST_WAIT = 0.1
LONGEST_WAIT = 5.0


@dataclass(slots=True)
class Progress:
    """What a client has seen of one request.

    Attributes:
      request_id: of the request.
      offsets: tokens seen of every choice.
      accepted: the server has said that it accepted the request.
      finished: choices that ended.
    """

    request_id: str
    offsets: list[int]
    accepted: bool = False
    finished: set[int] = field(default_factory=set)

    def take(self, response: pb.GenerateResponse) -> Delta:
        """The piece of output in a response, which is seen from here on.

        Raises:
          SpotjaxError: it does not go on where the last one of its choice ended.
        """
        delta = delta_from(response)
        if delta.choice >= len(self.offsets) or delta.offset != self.offsets[delta.choice]:
            raise SpotjaxError(
                f"request {self.request_id}: choice {delta.choice} goes on at token {delta.offset}, "
                f"but of its choices {self.offsets} tokens were seen"
            )
        self.offsets[delta.choice] += len(delta.tokens)
        if delta.finish is not None:
            self.finished.add(delta.choice)
        return delta

    @property
    def complete(self) -> bool:
        """Whether all choices ended."""
        return len(self.finished) == len(self.offsets)

    def resume_request(self) -> pb.ResumeRequest:
        """Asks for everything not yet seen."""
        return built(pb.ResumeRequest, request_id=self.request_id, offsets=self.offsets)


def backoff(failures: int) -> float:
    """Seconds to wait after the ``failures``-th failure in a row: doubling, bounded, jittered by a quarter."""
    return min(FIRST_WAIT * 2.0 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
