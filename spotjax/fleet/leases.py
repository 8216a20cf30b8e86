"""Who is alive, as far as signs of life tell: one lease per instance, prolonged by its beats.

Bookkeeping only: no clock, no sockets. Every ``now`` is the caller's monotonic clock, in seconds. What follows from an
expired lease is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Lease:
    """Until when one incarnation of an instance counts as alive, and whether it was ever heard."""

    incarnation: str
    expiry: float
    heard: bool = True


class Leases:
    """The leases of all instances, each ``seconds`` long.

    Silence means a lost instance only while somebody listens. A controller that was stalled itself (stopped, starved of
    CPU, a long garbage collection) has heard nobody, with the beats waiting in its sockets. Its watch loop therefore
    wakes several times per lease, measures by how much later than asked it woke, and reports that time by ``stalled``
    before it looks at ``expired``. It reports no delay shorter than the interval of beats: a busy controller wakes a
    little late every time, and the sum would put off the end of instances that are silent.
    """

    def __init__(self, seconds: float) -> None:
        """Raises: ValueError when ``seconds`` is not positive."""
        if not seconds > 0:
            raise ValueError(f"a lease of {seconds} s is over before it begins; give a positive number of seconds")
        self.seconds = seconds
        self._leases: dict[str, Lease] = {}

    def grant(self, name: str, incarnation: str, now: float) -> None:
        """Starts a full lease; one of an earlier incarnation ends here."""
        self._leases[name] = Lease(incarnation, now + self.seconds)

    def expect(self, name: str, incarnation: str, now: float, seconds: float) -> None:
        """Starts a lease of ``seconds`` for somebody who does not beat yet; the first beat makes it an ordinary one."""
        self._leases[name] = Lease(incarnation, now + seconds, heard=False)

    def beat(self, name: str, incarnation: str, now: float) -> bool:
        """Prolongs the lease to ``seconds`` from now; also one that is over but was not yet revoked.

        Returns: False, with nothing changed, when no lease of that incarnation is held.
        """
        lease = self._leases.get(name)
        if lease is None or lease.incarnation != incarnation:
            return False
        expiry = now + self.seconds
        lease.expiry, lease.heard = max(lease.expiry, expiry) if lease.heard else expiry, True
        return True

    def revoke(self, name: str) -> bool:
        """Ends a lease. Returns whether there was one."""
        return self._leases.pop(name, None) is not None

    def stalled(self, seconds: float, now: float) -> None:
        """Gives back the ``seconds`` up to ``now`` in which the caller did not run and could hear nobody.

        Every lease goes on with what it had left when the stall began. None gets more than a full lease from now on,
        so that instances which were granted one or heard since are not trusted longer than others.

        Raises:
          ValueError: ``seconds`` is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"stalled for {seconds} s: the time of a stall cannot be negative")
        for lease in self._leases.values():
            lease.expiry = max(lease.expiry, min(lease.expiry + seconds, now + self.seconds))

    def expired(self, now: float) -> tuple[str, ...]:
        """Instances whose lease is over, longest silent first; they stay listed until revoked or granted anew."""
        over = [(lease.expiry, name) for name, lease in self._leases.items() if lease.expiry <= now]
        return tuple(name for _, name in sorted(over))

    def next_expiry(self) -> float | None:
        """When the first lease will be over unless it is prolonged; None while no lease is held."""
        return min((lease.expiry for lease in self._leases.values()), default=None)

    def remaining(self, name: str, now: float) -> float:
        """Seconds that are left of a lease: 0 when it is over.

        Raises:
          KeyError: the instance holds no lease.
        """
        return max(0.0, self._leases[name].expiry - now)
