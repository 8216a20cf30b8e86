"""Who calls: a name, what it may do and how much of it. Data only; how a credential becomes a caller is in ``gate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from spotjax.errors import PermissionDenied


class Right(StrEnum):
    """What callers may do."""

    GENERATE = "generate"
    """Send requests, follow and cancel their own."""
    WATCH = "watch"
    """See instances, events and metrics."""
    OPERATE = "operate"
    """Change the fleet, run drills, save; see and end everybody's requests."""


class Role(StrEnum):
    """What kind of caller it is."""

    USER = "user"
    VIEWER = "viewer"
    ADMIN = "admin"


RIGHTS: dict[Role, frozenset[Right]] = {
    Role.USER: frozenset({Right.GENERATE}),
    Role.VIEWER: frozenset({Right.WATCH}),
    Role.ADMIN: frozenset(Right),
}


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """How much of the service a caller may use; 0 is no limit.

    Attributes:
      requests_per_minute: accepted requests.
      concurrent_requests: accepted ones that are not finished.
      tokens_per_minute, tokens_per_day: of prompts and output together.
    """

    requests_per_minute: int = 0
    concurrent_requests: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
      name: of the key; requests belong to it. Empty where no keys are configured.
      role: decides its rights.
      limits: how much it may use.
      models: names of models that it may use; empty for all.
    """

    name: str
    role: Role = Role.USER
    limits: CallerLimits = field(default_factory=CallerLimits)
    models: tuple[str, ...] = ()

    def may(self, right: Right) -> bool:
        """Whether its role has a right."""
        return right in RIGHTS[self.role]

    def require(self, right: Right) -> None:
        """Raises PermissionDenied unless its role has the right."""
        if not self.may(right):
            roles = " or ".join(role for role in Role if right in RIGHTS[role])
            raise PermissionDenied(f"this takes a key with role {roles}, {self.name} has role {self.role}")

    def may_use(self, model: str) -> bool:
        """Whether it may use the model."""
        return not self.models or model in self.models

    def require_model(self, model: str) -> None:
        """Raises PermissionDenied unless it may use the model."""
        if not self.may_use(model):
            raise PermissionDenied(f"{self.name} may use {', '.join(self.models)}, not {model}")

    def may_follow(self, owner: str) -> bool:
        """Whether it may see and end requests that belong to ``owner``."""
        return owner == self.name or self.may(Right.OPERATE)


ANYBODY = Caller("", Role.ADMIN)
"""Who calls where no keys are configured."""
