"""Compute Engine in memory: instances and operations of one project, as JSON, with capacities, quotas and preemptions.

Moves by its clock. What is on the wire is in ``gce_service``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]
GONE = "GONE"


class Refused(Exception):
    """An answer with an error.

    Attributes:
      status: of HTTP.
      reason: camel case, as in ``errors[].reason``.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass
class Instance:
    """One instance; ``due`` is what becomes of it, and when."""

    body: Json
    due: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Operation:
    """One operation, done at a time; ``failure`` is its error then."""

    body: Json
    done_at: float
    failure: Json | None = None


@dataclass
class GceCloud:
    """One project.

    Attributes:
      now: Unix seconds.
      capacity: machines of a type in a zone that there are at once; what is not named has no limit.
      quota: instances at once; None for no limit.
      start_seconds: in PROVISIONING, and again in STAGING.
      stop_seconds: in STOPPING.
      operation_seconds: until an operation is done that fails.
      operation_errors: codes of errors that the next inserts end with.
    """

    project: str
    now: Callable[[], float]
    capacity: dict[tuple[str, str], int] = field(default_factory=dict)
    quota: int | None = None
    start_seconds: float = 0.05
    stop_seconds: float = 0.05
    operation_seconds: float = 0.05
    operation_errors: list[str] = field(default_factory=list)
    templates: dict[str, Json] = field(default_factory=dict)
    instances: dict[tuple[str, str], Instance] = field(default_factory=dict)
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)
    by_request: dict[str, str] = field(default_factory=dict)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def reset(self) -> None:
        """Forgets everything but the templates."""
        self.quota = None
        for each in (self.capacity, self.operation_errors, self.instances, self.operations, self.by_request):
            each.clear()

    def insert(self, zone: str, body: Json, template: str, request_id: str) -> Json:
        """``instances.insert``."""
        self.advance()
        if request_id in self.by_request:
            return self.operation(zone, self.by_request[request_id])
        name = str(body.get("name", ""))
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise Refused(400, "invalid", f"Invalid value for field 'resource.name': '{name}'.")
        if template not in self.templates:
            raise Refused(404, "notFound", f"The resource '{template}' was not found")
        if (zone, name) in self.instances:
            raise Refused(409, "alreadyExists", f"The resource '{name}' already exists")
        for key, value in body.get("labels", {}).items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
                raise Refused(400, "invalid", f"Invalid label {key}={value}")
        if self.quota is not None and len(self.instances) >= self.quota:
            raise Refused(403, "quotaExceeded", f"Quota 'INSTANCES' exceeded. Limit: {self.quota}")
        properties = self.templates[template]["properties"]
        whole = {**properties, **body}
        kind = str(whole["machineType"]).rpartition("/")[2]
        now, operation = self.now(), self._operation(zone, "insert", name, "0")
        self.by_request[request_id] = operation.body["name"]
        if self.operation_errors:
            self._fail(operation, self.operation_errors.pop(0))
        elif self._used(zone, kind) >= self.capacity.get((zone, kind), 1 << 30):
            self._fail(operation, "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS")
        else:
            number = str(next(self.numbers))
            whole |= {
                "id": number, "kind": "compute#instance", "name": name, "status": "PROVISIONING",
                "machineType": self._link(f"zones/{zone}/machineTypes/{kind}"), "zone": self._link(f"zones/{zone}"),
                "creationTimestamp": rfc3339(now),
            }  # fmt: skip
            due = [(now + self.start_seconds, "STAGING"), (now + 2 * self.start_seconds, "RUNNING")]
            self.instances[zone, name] = Instance(whole, due)
            operation.body["targetId"], operation.done_at = number, now + 2 * self.start_seconds
        return self.operation(zone, operation.body["name"])

    def delete(self, zone: str, name: str) -> Json:
        """``instances.delete``."""
        self.advance()
        instance = self._instance(zone, name)
        operation = self._operation(zone, "delete", name, instance.body["id"])
        if [status for _, status in instance.due] != [GONE]:
            instance.body["status"] = "STOPPING"
            instance.due = [(self.now() + self.stop_seconds, GONE)]
        operation.done_at = self.now() + self.stop_seconds
        return self.operation(zone, operation.body["name"])

    def get(self, zone: str, name: str) -> Json:
        """``instances.get``."""
        self.advance()
        return self._instance(zone, name).body

    def listed(self) -> list[tuple[str, Json]]:
        """All instances with their zones."""
        self.advance()
        return [(zone, each.body) for (zone, _), each in sorted(self.instances.items())]

    def operation(self, zone: str, name: str) -> Json:
        """``zoneOperations.get``."""
        if (operation := self.operations.get((zone, name))) is None:
            raise Refused(404, "notFound", f"The resource '{name}' was not found")
        body = operation.body
        if operation.done_at <= self.now() and body["status"] != "DONE":
            body |= {"status": "DONE", "progress": 100} | (operation.failure or {})
        return body

    def operations_of(self, zone: str) -> Iterable[Json]:
        """``zoneOperations.list``."""
        return [self.operation(zone, name) for where, name in list(self.operations) if where == zone]

    def preempt(self, zone: str, name: str) -> None:
        """Takes a spot instance: it stops, and is deleted if it was made so."""
        self.advance()
        instance = self._instance(zone, name)
        scheduling = instance.body.get("scheduling", {})
        if scheduling.get("provisioningModel") != "SPOT":
            raise Refused(400, "invalid", f"{name} is no spot instance")
        self._operation(zone, "compute.instances.preempted", name, instance.body["id"])
        ends = GONE if scheduling.get("instanceTerminationAction") == "DELETE" else "TERMINATED"
        instance.body["status"], instance.due = "STOPPING", [(self.now() + self.stop_seconds, ends)]

    def shut_down(self, zone: str, name: str) -> None:
        """The guest shuts itself down."""
        self.advance()
        instance = self._instance(zone, name)
        instance.body["status"], instance.due = "STOPPING", [(self.now() + self.stop_seconds, "TERMINATED")]

    def advance(self) -> None:
        """Brings all instances to the present."""
        for key, instance in list(self.instances.items()):
            while instance.due and instance.due[0][0] <= self.now():
                _, status = instance.due.pop(0)
                if status == GONE:
                    del self.instances[key]
                    break
                instance.body["status"] = status

    def _used(self, zone: str, kind: str) -> int:
        return sum(
            where == zone and each.body["machineType"].endswith(f"/{kind}") and each.body["status"] != "TERMINATED"
            for (where, _), each in self.instances.items()
        )

    def _instance(self, zone: str, name: str) -> Instance:
        if (instance := self.instances.get((zone, name))) is None:
            raise Refused(
                404, "notFound", f"The resource 'projects/{self.project}/zones/{zone}/instances/{name}' was not found"
            )
        return instance

    def _operation(self, zone: str, kind: str, name: str, target: str) -> Operation:
        number = next(self.numbers)
        body = {
            "kind": "compute#operation", "id": str(number), "name": f"operation-{number}", "operationType": kind,
            "status": "RUNNING", "progress": 0, "targetId": target, "zone": self._link(f"zones/{zone}"),
            "targetLink": self._link(f"zones/{zone}/instances/{name}"), "insertTime": rfc3339(self.now()),
        }  # fmt: skip
        operation = self.operations[zone, f"operation-{number}"] = Operation(body, self.now())
        return operation

    def _fail(self, operation: Operation, code: str) -> None:
        operation.done_at = self.now() + self.operation_seconds
        operation.failure = {
            "httpErrorStatusCode": 503 if "EXHAUSTED" in code else 400,
            "httpErrorMessage": "failed",
            "error": {"errors": [{"code": code, "message": f"The operation failed with {code}."}]},
        }

    def _link(self, path: str) -> str:
        return f"https://www.googleapis.com/compute/v1/projects/{self.project}/{path}"


def rfc3339(seconds: float) -> str:
    """As Google writes times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
