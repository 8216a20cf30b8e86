"""Compute Engine's REST interface in front of ``gce_cloud``: ``python -m spotjax.testing.gce_service --port 0``.

Speaks the JSON of the calls that the provider makes, with pages, filters, and faults before a call has its effect, or
after, when only the answer is lost. Tests say what is to happen by ``POST /admin/WHAT`` with JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from spotjax.testing.gce_cloud import GceCloud, Json, Refused

TEMPLATE = {
    "name": "worker",
    "properties": {
        "machineType": "g2-standard-4",
        "labels": {"team": "serving"},
        "metadata": {"items": [{"key": "startup-script", "value": "#!/bin/sh"}, {"key": "kept", "value": "yes"}]},
        "disks": [{"boot": True, "autoDelete": True}],
        "scheduling": {"preemptionNoticeDuration": {"seconds": "120"}},
    },
}
TERM = re.compile(r"\(?\s*([\w.-]+)\s*=\s*\"?([\w.-]+)\"?\s*\)?")


@dataclass
class Fault:
    """What goes wrong with calls.

    Attributes:
      call: which ones: ``insert``, ``get``, ``list``, ``delete``, ``operation``, ``operations``, ``template``.
      status: of HTTP; 0: the connection is closed without an answer.
      reason: camel case.
      after: the call has its effect first.
      times: how often.
      retry_after: what the answer says to wait; empty: nothing.
      body: an answer that is not JSON.
      late: the connection is closed at once, and the call has its effect so many seconds later.
    """

    call: str
    status: int = 503
    reason: str = "backendError"
    after: bool = False
    times: int = 1
    retry_after: str = ""
    body: str = ""
    late: float = 0.0


class Server(ThreadingHTTPServer):
    """The interface."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], cloud: GceCloud, page: int) -> None:
        super().__init__(address, Handler)
        self.cloud, self.page = cloud, page
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.silent: list[str] = []
        """Zones that listings do not reach."""
        self.calls: list[str] = []

    def fault(self, call: str, after: bool) -> Fault | None:
        """The fault that strikes now, if there is one."""
        for fault in self.faults:
            if fault.call in (call, "any") and fault.after == after and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def admin(self, what: str, body: Json) -> Json:
        """What tests say and ask."""
        cloud = self.cloud
        match what:
            case "reset":  # as after the start
                cloud.reset()
                self.faults, self.silent, self.calls = [], [], []
            case "capacity":
                cloud.capacity[body["zone"], body["type"]] = body["count"]
            case "no_limit":
                cloud.capacity.clear()
            case "quota":
                cloud.quota = body["count"]
            case "preempt":
                cloud.preempt(body["zone"], body["name"])
            case "shut_down":
                cloud.shut_down(body["zone"], body["name"])
            case "fail":
                self.faults.append(Fault(**body))
            case "fail_operation":
                cloud.operation_errors.append(body["code"])
            case "silent":
                self.silent = body["zones"]
            case "place":  # an instance that somebody else has made
                cloud.insert(body["zone"], body["instance"], next(iter(cloud.templates)), f"placed-{time.time_ns()}")
            case "state":
                return {"instances": [each for _, each in cloud.listed()], "calls": self.calls}
            case _:
                raise Refused(404, "notFound", what)
        return {}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Reads."""
        self._answer()

    def do_POST(self) -> None:
        """Inserts."""
        self._answer()

    def do_DELETE(self) -> None:
        """Deletes."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        with self.server.lock:
            try:
                body = json.loads(text) if text else {}
                if parts.path.startswith("/admin/"):
                    self._send(200, self.server.admin(parts.path.removeprefix("/admin/"), body))
                    return
                call, given = self._call(unquote(parts.path))
                self.server.calls.append(call)
                if (fault := self.server.fault(call, after=False)) is not None:
                    if fault.late:
                        threading.Timer(fault.late, self._perform_late, (call, given, query, body)).start()
                    self._fail(fault)
                    return
                answer = self._perform(call, given, query, body)
                if (fault := self.server.fault(call, after=True)) is not None:
                    self._fail(fault)
                    return
                self._send(200, answer)
            except Refused as refused:
                self._send(refused.status, error_body(refused.status, refused.reason, str(refused)))

    def _call(self, path: str) -> tuple[str, tuple[str, ...]]:
        root = f"/compute/v1/projects/{self.server.cloud.project}/"
        if not path.startswith(root):
            raise Refused(403, "forbidden", f"Required permission for {path}")
        rest = path.removeprefix(root)
        for method, pattern, call in (
            ("POST", r"zones/([^/]+)/instances", "insert"),
            ("GET", r"zones/([^/]+)/instances/([^/]+)", "get"),
            ("DELETE", r"zones/([^/]+)/instances/([^/]+)", "delete"),
            ("GET", r"aggregated/instances", "list"),
            ("GET", r"zones/([^/]+)/operations/([^/]+)", "operation"),
            ("GET", r"zones/([^/]+)/operations", "operations"),
            ("GET", r"((?:global|regions/[^/]+)/instanceTemplates/[^/]+)", "template"),
        ):
            if method == self.command and (found := re.fullmatch(pattern, rest)):
                return call, found.groups()
        raise Refused(404, "notFound", f"{self.command} {path}")

    def _perform_late(self, *asked: Any) -> None:
        with self.server.lock, contextlib.suppress(Refused):
            self._perform(*asked)

    def _perform(self, call: str, given: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
        cloud = self.server.cloud
        match call:
            case "insert":
                template = query["sourceInstanceTemplate"].removeprefix(f"projects/{cloud.project}/")
                return cloud.insert(given[0], body, template, query["requestId"])
            case "get":
                return cloud.get(*given)
            case "delete":
                return cloud.delete(*given)
            case "list":
                return self._listed(query)
            case "operation":
                return cloud.operation(*given)
            case "operations":
                kept = [each for each in cloud.operations_of(given[0]) if passes(each, query.get("filter", ""))]
                return self._page({each["id"].zfill(9): each for each in kept}, query, lambda page: {"items": page})
            case _:
                if given[0] not in cloud.templates:
                    raise Refused(404, "notFound", f"The resource '{given[0]}' was not found")
                return cloud.templates[given[0]]

    def _listed(self, query: dict[str, str]) -> Json:
        kept = [pair for pair in self.server.cloud.listed() if passes(pair[1], query.get("filter", ""))]
        silent = self.server.silent

        def scoped(page: list[Any]) -> Json:
            scopes: Json = {"zones/elsewhere": {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "none"}}}
            for zone in silent:
                scopes[f"zones/{zone}"] = {"warning": {"code": "UNREACHABLE", "message": "the zone does not answer"}}
            for zone, instance in page:
                if zone not in silent:
                    scopes.setdefault(f"zones/{zone}", {"instances": []})["instances"].append(instance)
            return {"items": scopes}

        return self._page({f"{zone}/{each['name']}": (zone, each) for zone, each in kept}, query, scoped)

    def _page(self, all: Json, query: dict[str, str], shown: Callable[[list[Any]], Json]) -> Json:
        """A page of what is given by its key; the next one begins after the last key, whatever has changed since."""
        rest = sorted(key for key in all if key > query.get("pageToken", ""))
        page = rest[: min(self.server.page, int(query.get("maxResults") or 500))]
        return {**shown([all[key] for key in page]), **({"nextPageToken": page[-1]} if len(page) < len(rest) else {})}

    def _fail(self, fault: Fault) -> None:
        if fault.status == 0 or fault.late:
            self.close_connection = True
            return
        body = (
            fault.body.encode()
            if fault.body
            else json.dumps(error_body(fault.status, fault.reason, "injected")).encode()
        )
        self._bytes(fault.status, body, fault.retry_after)

    def _send(self, status: int, body: Json) -> None:
        self._bytes(status, json.dumps(body).encode())

    def _bytes(self, status: int, body: bytes, retry_after: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)


def error_body(status: int, reason: str, message: str) -> Json:
    """As Compute Engine writes errors."""
    return {"error": {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}}


def passes(body: Json, filter: str) -> bool:
    """Whether a filter lets it through: ``KEY=VALUE``, several of them by AND; keys of labels have a point."""
    for key, value in TERM.findall(filter):
        first, _, rest = key.partition(".")
        there = body.get(first, {}).get(rest) if rest else body.get(first)
        if str(there) != value:
            return False
    return True


def main() -> int:
    """Serves until SIGTERM; prints its address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--project", default="project-1")
    parser.add_argument("--page", type=int, default=500)
    parser.add_argument("--start-seconds", type=float, default=0.05)
    parser.add_argument("--stop-seconds", type=float, default=0.05)
    parser.add_argument("--operation-seconds", type=float, default=0.05)
    given = parser.parse_args()
    cloud = GceCloud(
        given.project, time.time, start_seconds=given.start_seconds, stop_seconds=given.stop_seconds,
        operation_seconds=given.operation_seconds,
        templates={"global/instanceTemplates/worker": TEMPLATE, "regions/r/instanceTemplates/worker": TEMPLATE},
    )  # fmt: skip
    server = Server(("127.0.0.1", given.port), cloud, given.page)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
