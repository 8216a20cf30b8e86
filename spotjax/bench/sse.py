"""Server-sent events, as far as OpenAI's dialect has them: bytes in, the data of whole events out. Pure.

After the HTML standard (https://html.spec.whatwg.org/multipage/server-sent-events.html): lines that begin with a colon
are comments, several ``data`` lines of one event are joined by line feeds. Carriage returns alone do not end lines.
"""

from __future__ import annotations

MOST_BYTES = 4 << 20
"""An event that is longer never ends: that is no event stream."""


class EventStream:
    """Puts events together from pieces that end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that are complete with this piece.

        Raises:
          ValueError: an event is longer than ``MOST_BYTES``.
        """
        *whole, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes without the end of an event")
        return [data for block in whole if (data := _data(block)) is not None]

    def end(self) -> list[bytes]:
        """Data of the last event, of a server that leaves out the empty line after it."""
        rest, self._rest = self._rest, b""
        data = _data(rest)
        return [] if data is None else [data]


def _data(block: bytes) -> bytes | None:
    """Of one event; None if it has none."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]  # nearly all of them
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
