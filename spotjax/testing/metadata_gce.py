"""A stand-in for Compute Engine's metadata server, as a VM or a TPU VM sees it, over HTTP.

Like the real one it wants ``Metadata-Flavor: Google``, refuses what was forwarded, has ETags, and holds requests with
``wait_for_change`` until ``last_etag`` is not the value's any more or ``timeout_sec`` is over. Beside that it can be
told what to say, and to go wrong: ``PUT /admin/values/KEY`` with the new value, ``POST /admin/faults`` with a JSON list
of ``Fault``, ``GET /admin/answered`` for what it said when.

``python -m spotjax.testing.metadata_gce --port 0 [--tpu]`` prints its address.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

ROOT = "/computeMetadata/v1/"
VALUES = {
    "instance/preempted": "FALSE",
    "instance/maintenance-event": "NONE",
    "instance/upcoming-maintenance": "{}",
    "instance/name": "vm-0",
    "instance/zone": "projects/1/zones/us-central1-a",
    "instance/attributes/enable-oslogin": "TRUE",
}
TPU_VALUES = {
    "instance/attributes/tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'",
    "instance/attributes/agent-worker-number": "0",
}
LONGEST_WAIT = 3600.0

Kind = Literal["status", "drop", "half", "hang", "redirect", "stranger", "garbage", "empty"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with an answer.

    Attributes:
      kind: ``status``, that HTTP status instead; ``drop``, the connection closes without an answer; ``half``, in the
        middle of one; ``hang``, no answer for so many seconds; ``redirect``, to elsewhere; ``stranger``, an answer
        without ``Metadata-Flavor``; ``garbage``, a text that means nothing; ``empty``, none.
      status: for ``status``.
      seconds: for ``hang``.
      retry_after: header with ``status``.
    """

    kind: Kind
    status: int = 503
    seconds: float = 1.0
    retry_after: str = ""


@dataclass(frozen=True)
class Answered:
    """A value that was told.

    Attributes:
      key: of it.
      value: what was told.
      time: Unix seconds, after it was written.
    """

    key: str
    value: str
    time: float


class GceMetadata(ThreadingHTTPServer):
    """The server, with what it knows. Thread-safe.

    Args:
      port: to listen on; 0 takes a free one.
      tpu: whether it is a TPU VM's.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, *, tpu: bool = False) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.values = {**VALUES, **(TPU_VALUES if tpu else {})}
        self.answered: list[Answered] = []
        self.changed = threading.Condition()
        self.faults: deque[Fault] = deque()
        self._versions = itertools.count()
        self._etags = {key: self._etag(key) for key in self.values}

    def tell(self, key: str, value: str) -> None:
        """Changes a value: who waits for that is answered."""
        with self.changed:
            if self.values.get(key) != value:
                self.values[key], self._etags[key] = value, self._etag(key)
            self.changed.notify_all()

    def fail(self, *faults: Fault) -> None:
        """Spoils the next answers, one fault for each."""
        self.faults.extend(faults)

    def held(self, key: str, last_etag: str | None, seconds: float) -> tuple[str, str] | None:
        """Value and ETag, once it is not that ETag or the time is over; None if there is no such key."""
        with self.changed:
            last = self._etags.get(key) if last_etag is None else last_etag
            self.changed.wait_for(lambda: self._etags.get(key) != last, seconds)
            return self.now(key)

    def now(self, key: str) -> tuple[str, str] | None:
        """Value and ETag; None if there is no such key. A directory is the list of what is in it."""
        if key.endswith("/"):
            inside = sorted({name[len(key) :].split("/")[0] for name in self.values if name.startswith(key)})
            return ("\n".join(inside), "0") if inside else None
        return (self.values[key], self._etags[key]) if key in self.values else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are none of our problems."""

    def _etag(self, key: str) -> str:
        return hashlib.sha256(f"{key} {next(self._versions)}".encode()).hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one write: headers by themselves would wait for an acknowledgement
    server: GceMetadata

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path == "/admin/answered":
            self._send(200, json.dumps([asdict(answered) for answered in self.server.answered]))
        elif not address.path.startswith(ROOT):
            self._send(404, "not found")
        elif self.headers.get("Metadata-Flavor") != "Google" or self.headers.get("X-Forwarded-For"):
            self._send(403, "Missing Metadata-Flavor:Google header.")
        elif not self._spoilt():
            self._tell(address.path[len(ROOT) :], {name: each[-1] for name, each in parse_qs(address.query).items()})

    def do_PUT(self) -> None:
        """The admin's; on the real one, too, that is no method."""
        body = self._body()
        if not self.path.startswith("/admin/values/"):
            self._send(405, "method not allowed")
            return
        self.server.tell(self.path.removeprefix("/admin/values/"), body)
        self._send(200, "")

    def do_POST(self) -> None:
        body = self._body()
        if self.path != "/admin/faults":
            self._send(405, "method not allowed")
            return
        self.server.fail(*(Fault(**fault) for fault in json.loads(body)))
        self._send(200, "")

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads that."""

    def _tell(self, key: str, query: dict[str, str]) -> None:
        if query.get("wait_for_change") == "true":
            seconds = float(query.get("timeout_sec", LONGEST_WAIT))
            found = self.server.held(key, query.get("last_etag"), seconds)
        else:
            found = self.server.now(key)
        if found is None:
            self._send(404, "not found")
            return
        if self._spoilt(late=True):
            return
        value, etag = found
        self._send(200, value, {"Metadata-Flavor": "Google", "ETag": etag})
        self.server.answered.append(Answered(key, value, time.time()))

    def _spoilt(self, late: bool = False) -> bool:
        """Whether the next fault has taken the answer's place: before its value is waited for, or afterwards."""
        try:
            fault = self.server.faults[0]
            if (fault.kind in ("half", "garbage")) is not late:
                return False
            self.server.faults.popleft()
        except IndexError:
            return False
        google = {"Metadata-Flavor": "Google"}
        match fault.kind:
            case "status":
                self._send(fault.status, "", google | ({"Retry-After": fault.retry_after} if fault.retry_after else {}))
            case "hang":
                time.sleep(fault.seconds)
                self.close_connection = True
            case "drop":
                self.close_connection = True
            case "half":
                self._send(200, "TRUE", google | {"Content-Length": "40"})
                self.close_connection = True
            case "redirect":
                self._send(302, "", {"Location": "/admin/answered"})
            case "stranger":
                self._send(200, "TRUE")
            case "garbage":
                self._send(200, "<html>TRUE</html>", google | {"ETag": "garbage"})
            case "empty":
                self._send(200, "", google)
        return True

    def _body(self) -> str:
        return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        fields = {"Content-Type": "application/text", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


@contextlib.contextmanager
def serving(*, tpu: bool = False) -> Iterator[GceMetadata]:
    """A server in a thread of this process."""
    server = GceMetadata(tpu=tpu)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description="a stand-in for Compute Engine's metadata server")
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0 takes a free one")
    parser.add_argument("--tpu", action="store_true", help="be that of a TPU VM")
    arguments = parser.parse_args()
    server = GceMetadata(arguments.port, tpu=arguments.tpu)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
