"""How long Kubernetes must let a container end, and what notice a worker can give the fleet within that. Arithmetic.

``terminationGracePeriodSeconds`` runs from the deletion of the pod to SIGKILL: first the preStop hook, then SIGTERM.
"""

from __future__ import annotations

import math

SLACK_SECONDS = 3.0
"""From the end of what a process does on SIGTERM to its exit, and for the kubelet to deliver the signal."""


def termination_seconds(pre_stop: float, work: float) -> int:
    """``terminationGracePeriodSeconds`` of a container that works on for so long after SIGTERM.

    Args:
      pre_stop: seconds that its preStop hook takes before that.
      work: seconds, such as a server's ``drain_seconds`` or a worker's ``grace_seconds``.
    """
    return math.ceil(pre_stop + work + SLACK_SECONDS)


def grace_within(notice: float) -> float:
    """``grace_seconds`` of a worker without a preStop hook whose node gives it ``notice`` seconds after SIGTERM."""
    return notice - SLACK_SECONDS
