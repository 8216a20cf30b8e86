"""A Ray cluster of several nodes on this machine, for tests."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import psutil

QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""So that a node that is killed is known to be dead in seconds."""
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0"}


class RayNodes:
    """The cluster: a head with no room for machines, and nodes.

    Attributes:
      address: of the head.
    """

    def __init__(self) -> None:
        factory = logging.getLogRecordFactory()
        from ray.cluster_utils import Cluster

        logging.setLogRecordFactory(factory)  # ray makes all log records of the process carry a field of its own
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address

    def add(self, machines: int = 1, labels: Mapping[str, str] = {"ray.io/market-type": "spot"}) -> Any:
        """Adds a node with room for that many machines."""
        node = self._cluster.add_node(
            num_cpus=0, resources={"spotjax": machines}, labels=dict(labels), include_dashboard=False
        )
        return node

    def kill(self, node: Any) -> None:
        """Takes a node away without a word."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """Lets the cluster know that a node will be preempted."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        end = int((time.time() + seconds) * 1000)
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "a test", end)
        assert accepted, why

    def close(self) -> None:
        """Ends all of it."""
        self._cluster.shutdown()


@contextlib.contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A cluster that leaves nothing behind."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        nodes = RayNodes()
        try:
            yield nodes
        finally:
            nodes.close()


def process_of(text: str) -> psutil.Process | None:
    """The child of an actor that has this in its command line."""
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or ()
        if any(text in argument for argument in arguments) and any(a.startswith("--notice-file=") for a in arguments):
            return process
    return None


def is_on(process: psutil.Process, node: Any) -> bool:
    """Whether an actor of that node started the process."""
    raylets = {each.process.pid for each in node.all_processes.get("raylet", ())}  # none when it was killed
    return any(parent.pid in raylets for parent in process.parents())
