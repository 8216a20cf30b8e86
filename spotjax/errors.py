"""Every error that Spotjax raises on purpose.

The tree:

    SpotjaxError
      ConfigError            a setting is unknown or out of range
      CheckpointError        a checkpoint lacks a tensor or has one of the wrong shape; or cannot be written
      InvalidRequest         a request field is unsupported or out of range; names the field
        UnknownModel         the model is not served here
        RequestExists        the id is that of an accepted request
      UnknownRequest         no request of that id is known (never was, or its retention ended)
      Unauthenticated        a key or token is needed, and there is none, or none that is valid
      PermissionDenied       the caller is known, and may not do this
      Overloaded             the queue is full; says when to try again
        RateLimited          the caller has used up what it may use
      Draining               the server takes no new requests
      CommitLogError         the commit log cannot be used: damaged, in use, or another model's
        LogUnavailable       it cannot be written now, so nothing new is accepted
      PlanError
        NoFeasibleShape      no mesh shape fits the instances; says what would
        NotEnoughPlaces      fewer places than stage groups to put on them
        SliceUnavailable     a slice that is needed is held by nobody
      FleetError
        UnknownInstance      no instance of that name is part of the fleet
        NoSpareDevices       more instances were asked for than there are devices left
        InstanceLost         the machine that was to do the work is gone
        PeerUnreachable      an instance cannot be reached by another one; names it
        MetadataUnavailable  a machine's metadata server does not answer, or not with an answer
        ProviderError        whoever rents machines out does not do what was asked
          OutOfCapacity      it has no such machines now
          QuotaExceeded      this account may not have more of them
          ProviderRefused    not allowed, or wrong; trying again is of no use
          ProviderUnavailable  it does not answer, or says to try again; says when
      TransportError
        ConnectionLost       the other side is gone, silent, or not one to talk to
        TransferRefused      the peer has not, or does not give, what was asked for
        ChecksumMismatch     bytes arrived other than they were sent
      EndpointFailed         a server that is measured has no complete answer for a request

Messages say what was wrong, with which value, and what to do. The API maps each class to one gRPC status.
"""

from __future__ import annotations


class SpotjaxError(Exception):
    """Base of the tree; never raised itself."""


class ConfigError(SpotjaxError):
    """A setting is unknown or out of range."""


class CheckpointError(SpotjaxError):
    """A checkpoint cannot be read as the model that its configuration describes, or cannot be written."""


class InvalidRequest(SpotjaxError):
    """A request field is unsupported or out of range.

    Attributes:
      field: the field as the API spells it, e.g. ``sampling.top_p``.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class UnknownModel(InvalidRequest):
    """The model that a request names is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__("model", f"this server serves {served!r}, got {name!r}")


class RequestExists(InvalidRequest):
    """The id is that of a request that was accepted before."""

    def __init__(self, request_id: str) -> None:
        super().__init__("request_id", f"{request_id!r} is taken; choose another or resume it")


class UnknownRequest(SpotjaxError):
    """No request of that id is known."""


class Unauthenticated(SpotjaxError):
    """A key or token is needed, and none was shown, or none that is valid."""


class PermissionDenied(SpotjaxError):
    """The caller is known, and may not do this."""


class Overloaded(SpotjaxError):
    """The queue is full.

    Attributes:
      retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The caller has used up what it may use for now; others are served."""


class Draining(SpotjaxError):
    """The server is finishing its requests before it exits and takes no new ones."""


class CommitLogError(SpotjaxError):
    """The commit log cannot be used: it is damaged, in use by another process, or that of another model."""


class LogUnavailable(CommitLogError):
    """The commit log cannot be written at the moment."""


class PlanError(SpotjaxError):
    """No plan exists for what was asked."""


class NoFeasibleShape(PlanError):
    """No mesh shape fits the instances."""


class NotEnoughPlaces(PlanError):
    """Fewer places than stage groups."""

    def __init__(self, wanted: int, offered: int) -> None:
        super().__init__(f"{wanted} stage groups need a place each, the instances offer {offered}")
        self.wanted, self.offered = wanted, offered


class SliceUnavailable(PlanError):
    """A slice that is needed is held by nobody who is alive."""


class FleetError(SpotjaxError):
    """Something about the instances stands in the way."""


class UnknownInstance(FleetError):
    """No instance of that name is part of the fleet."""


class NoSpareDevices(FleetError):
    """More instances were asked for than there are devices left."""


class InstanceLost(FleetError):
    """The machine that was to do the work is gone."""


class PeerUnreachable(FleetError):
    """One instance cannot reach another.

    Attributes:
      instance: the one that cannot be reached.
    """

    def __init__(self, instance: str, problem: object) -> None:
        super().__init__(f"instance {instance} cannot be reached: {problem}")
        self.instance = instance


class MetadataUnavailable(FleetError):
    """A machine's metadata server did not answer, or with something that is not an answer.

    Attributes:
      trouble: which kind of trouble it is, in a few words that are the same each time.
      retry_after: seconds after which the server said to ask again; None if it said nothing.
    """

    def __init__(self, trouble: str, detail: object = "", retry_after: float | None = None) -> None:
        super().__init__(f"{trouble}: {detail}" if detail != "" else trouble)
        self.trouble, self.retry_after = trouble, retry_after


class ProviderError(FleetError):
    """Whoever rents machines out does not do what was asked."""


class OutOfCapacity(ProviderError):
    """The provider has no such machines now; another zone, type or price class may have."""


class QuotaExceeded(ProviderError):
    """The account may not have more of these machines."""


class ProviderRefused(ProviderError):
    """The provider does not allow it, or does not understand it; trying again is of no use before something changes."""


class ProviderUnavailable(ProviderError):
    """The provider does not answer, or says to try again.

    Attributes:
      retry_after: seconds after which it said to try again; None if it said nothing.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TransportError(SpotjaxError):
    """Something about the connection to another process stands in the way."""


class ConnectionLost(TransportError):
    """The other side is gone, silent, or refused the connection."""


class TransferRefused(TransportError):
    """The peer has not, or does not give, what was asked for; its own words."""


class ChecksumMismatch(TransportError):
    """Bytes arrived other than they were sent, several times over."""


class EndpointFailed(SpotjaxError):
    """A server that is measured, ours or another, has no complete answer for a request.

    Attributes:
      kind: which kind of failure it is, in a few words that are the same each time.
      said: what was said about it.
    """

    def __init__(self, kind: str, said: object) -> None:
        super().__init__(f"{kind}: {said}")
        self.kind, self.said = kind, str(said)
