"""A stand-in for Compute Engine's metadata server, as a VM or a TPU VM sees it.

Like the real one it wants ``Metadata-Flavor: Google``, refuses what was forwarded, has ETags, and holds requests with
``wait_for_change`` until ``last_etag`` is not the value's any more or ``timeout_sec`` is over. Beside that it can be
told what to say, see ``spotjax.testing.metadata_server``. ``python -m spotjax.testing.metadata_gce --port 0`` prints
its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from spotjax.testing.metadata_faults import Reply, Request
from spotjax.testing.metadata_server import run

ROOT = "/computeMetadata/v1/"
VALUES = {
    "instance/preempted": "FALSE",
    "instance/maintenance-event": "NONE",
    "instance/upcoming-maintenance": '{"error":"no notifications have been received yet, try again later"}',
    "instance/name": "vm-0",
    "instance/zone": "projects/1/zones/us-central1-a",
    "instance/attributes/enable-oslogin": "TRUE",
}
TPU_VALUES = {
    "instance/attributes/tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'",
    "instance/attributes/agent-worker-number": "0",
}
LONGEST_WAIT = 3600.0


class GceMetadata:
    """What it knows.

    Args:
      wall: the platform's clock, Unix seconds.
      tpu: whether it is a TPU VM's.
    """

    def __init__(self, wall: Callable[[], float] = time.time, *, tpu: bool = False) -> None:
        self._wall = wall
        self._versions = itertools.count()
        self._changed = asyncio.Event()
        self.values: dict[str, str] = {}
        self._etags: dict[str, str] = {}
        for key, value in {**VALUES, **(TPU_VALUES if tpu else {})}.items():
            self.tell(key, value)
        self.orders: dict[str, Callable[..., Any]] = {"tell": self.tell, "be_tpu": self.be_tpu}

    def tell(self, key: str, value: str) -> None:
        """Changes a value: who waits for that is answered."""
        if self.values.get(key) != value:
            self.values[key] = value
            self._etags[key] = hashlib.sha256(f"{key} {next(self._versions)}".encode()).hexdigest()[:16]
            self._changed.set()
            self._changed = asyncio.Event()

    def be_tpu(self) -> None:
        """From now on a TPU VM's."""
        for key, value in TPU_VALUES.items():
            self.tell(key, value)

    async def answer(self, request: Request) -> Reply:
        """As the server answers."""
        if not request.path.startswith(ROOT):
            return self._reply(404)
        if request.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in request.headers:
            return self._reply(403, b"Missing Metadata-Flavor:Google header.")
        if request.method != "GET":
            return self._reply(405)
        key = request.path.removeprefix(ROOT)
        if key.endswith("/"):
            inside = sorted({name[len(key) :].split("/")[0] for name in self.values if name.startswith(key)})
            return self._reply(200, "\n".join(inside).encode()) if inside else self._reply(404)
        if key not in self.values:
            return self._reply(404)
        if request.query.get("wait_for_change") == "true":
            last = request.query.get("last_etag", self._etags[key])
            await self._change(key, last, float(request.query.get("timeout_sec", LONGEST_WAIT)))
        return self._reply(200, self.values[key].encode(), {"ETag": self._etags[key]})

    async def _change(self, key: str, last: str, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._etags[key] == last:
                    await self._changed.wait()

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        date = formatdate(int(self._wall()), usegmt=True)
        fields = {"Metadata-Flavor": "Google", "Content-Type": "application/text", "Server": "Metadata Server for VM"}
        return Reply(body, status, {**fields, "Date": date, **(headers or {})})


if __name__ == "__main__":
    run(GceMetadata(), "a stand-in for Compute Engine's metadata server")
