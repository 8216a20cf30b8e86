"""Who keeps copies of whose KV. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def choose_keepers(used: Collection[str], zones: Mapping[str, str]) -> dict[str, str]:
    """For each instance of the mesh the one that keeps copies of its KV: the next by name, in another zone if possible.

    A spare instance only where the mesh has no other: the loss of one that is part of the mesh leads to another mesh,
    and so to another keeper; that of a spare would leave an instance without one unnoticed.

    Args:
      used: instances that the mesh stands on.
      zones: zone of every instance that is ready.

    Returns: instance to keeper; instances that nobody can keep for are left out.
    """
    ready = sorted(zones)
    keepers = {}
    for instance in sorted(set(used).intersection(ready)):
        place = ready.index(instance)
        others = ready[place + 1 :] + ready[:place]
        if others:
            keepers[instance] = min(others, key=lambda other: (other not in used, zones[other] == zones[instance]))
    return keepers
