"""Which right every call takes. What is not named here takes the highest: something new is closed until it is named."""

from __future__ import annotations

from spotjax.api.access.callers import Right

OPEN_SERVICES = ("grpc.health.v1.Health", "spotjax.v1.Workers")
"""gRPC services that anybody may call: health, for load balancers; and the workers' door, which asks for its own token,
see ``fleet.door``."""

METHODS: dict[str, Right] = {
    "/spotjax.v1.Generation/Generate": Right.GENERATE,
    "/spotjax.v1.Generation/Resume": Right.GENERATE,
    "/spotjax.v1.Generation/Cancel": Right.GENERATE,
    "/spotjax.v1.Fleet/Status": Right.WATCH,
    "/spotjax.v1.Fleet/Watch": Right.WATCH,
}
"""Rights that methods of gRPC services take."""

ANY_CALLER = ("/spotjax.v1.Generation/Models",)
ANY_CALLER_SERVICES = ("grpc.reflection.v1alpha.ServerReflection",)
"""gRPC that takes a caller, whatever it may do."""

OPEN_PATHS = ("/", "/health", "/ready", "/version")
OPEN_PREFIXES = ("/ui",)
"""HTTP that anybody may ask for: probes, and the page's own files, which ask for a key themselves."""

GENERATING_PREFIXES = ("/v1/",)
WATCHING_PREFIXES = ("/metrics", "/fleet/")
"""Of HTTP paths; watching is to read them, anything else there is operating."""


def right_of_method(method: str) -> Right | None:
    """The right that a gRPC method takes besides a caller's name; None if none."""
    service = method.strip("/").partition("/")[0]
    if method in ANY_CALLER or service in ANY_CALLER_SERVICES:
        return None
    return METHODS.get(method, Right.OPERATE)


def open_method(method: str) -> bool:
    """Whether anybody may call a gRPC method."""
    return method.strip("/").partition("/")[0] in OPEN_SERVICES


def right_of_path(verb: str, path: str) -> Right:
    """The right that an HTTP request takes."""
    if path.startswith(GENERATING_PREFIXES):
        return Right.GENERATE
    if path.startswith(WATCHING_PREFIXES) and verb in ("GET", "HEAD"):
        return Right.WATCH
    return Right.OPERATE


def open_path(path: str) -> bool:
    """Whether anybody may ask for an HTTP path."""
    return path in OPEN_PATHS or any(path == prefix or path.startswith(f"{prefix}/") for prefix in OPEN_PREFIXES)
