"""A token bucket (Turner, "New directions in communications", 1986): so much at once, and so much in the long run.

Pure: time is passed in, and taking from a bucket gives another one. What is taken is the field's "token", whatever it
stands for here: requests, or a model's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """Fills at a steady rate up to its capacity; may be overdrawn, then it has to fill up again first.

    Attributes:
      capacity: most that it holds.
      per_second: how fast it fills.
      level: what was in it at ``time``; less than 0 when it is overdrawn.
      time: in seconds, of any clock that does not go backwards.
    """

    capacity: float
    per_second: float
    level: float
    time: float

    @classmethod
    def full(cls, capacity: float, seconds: float, time: float) -> TokenBucket:
        """One that is full and takes ``seconds`` to fill when it is empty."""
        return cls(capacity, capacity / seconds, capacity, time)

    def level_at(self, time: float) -> float:
        """What is in it then, if nothing is taken before."""
        return min(self.capacity, self.level + self.per_second * max(0.0, time - self.time))

    def take(self, amount: float, time: float) -> TokenBucket:
        """The bucket after ``amount`` was taken, whether there was enough or not."""
        return TokenBucket(self.capacity, self.per_second, self.level_at(time) - amount, max(time, self.time))

    def wait(self, amount: float, time: float) -> float:
        """Seconds until ``amount`` is in it, 0 if it is; infinite if it never will be."""
        if amount > self.capacity:
            return float("inf")
        return max(0.0, amount - self.level_at(time)) / self.per_second
