"""What can be said of how a fresh machine comes to a worker, and what of it does not go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from spotjax import __version__
from spotjax.bootstrap.places import place
from spotjax.config import ADDRESS, NAME, TLS, TYPES, where_of
from spotjax.errors import ConfigError

Platform = Literal["gce", "tpu", "aws", "slurm"]
Accelerator = Literal["auto", "cpu", "cuda12", "cuda13", "tpu"]
ACCELERATORS: dict[Platform, Accelerator] = {"tpu": "tpu"}
"""What ``auto`` means; elsewhere cuda13."""
IMAGE = r"[a-z0-9]([\w.:/-]*\w)?(@sha256:[0-9a-f]{64})?"
"""Of container images."""
PRINTABLE = r"[^\x00-\x1f\x7f]*"
DECIDED = {
    "join", "name", "zone", "price_class", "grace_seconds", "data_listen", "advertise", "slice_hosts", "slice_host",
    "slice_coordinator", "join_token", *TLS,
}  # fmt: skip
"""Settings of a worker that follow from other options, or that the machine finds out."""
INSTALLATION = ("version", "wheel", "index_url", "find_links", "constraints", "system_packages", "python")
UNFIT: dict[Platform, tuple[str, ...]] = {
    "slurm": ("name", "user", "join_minutes", "image", *INSTALLATION[:-1]),
}
"""Options without meaning on a platform: its own machinery decides that."""


class BootstrapOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a fresh machine comes to a worker. ``checked`` checks them."""

    join: Annotated[str, Meta(pattern=rf"^{ADDRESS}\Z", description="HOST:PORT of the controller")]
    name: Annotated[
        str, Meta(pattern=rf"^({NAME})?\Z", description="of the instance; empty: the machine's name on its platform")
    ] = ""
    zone: Annotated[
        str, Meta(pattern=rf"^({NAME})?\Z", description="where the machine is; empty: asked from its platform")
    ] = ""
    price_class: Annotated[
        Literal["auto", "spot", "on_demand"],
        Meta(description="whether the machine can be taken away; auto: as its platform says, else spot"),
    ] = "auto"
    grace_seconds: Annotated[
        float, Meta(ge=0, le=3600, description="how long the machine still lives after SIGTERM")
    ] = 25.0
    data_port: Annotated[
        int, Meta(ge=1, le=65535, description="port of the worker's data endpoint; libtpu has 8471")
    ] = 8472
    accelerator: Annotated[
        Accelerator,
        Meta(description="which jax is installed, and which devices are waited for; auto: tpu, else cuda13"),
    ] = "auto"
    version: Annotated[
        str, Meta(pattern=r"^\d+(\.\d+)*([a-z.+]+[\w.]*)?\Z", description="of Spotjax, the same as the controller's")
    ] = __version__
    wheel: Annotated[
        str, Meta(pattern=rf"^{PRINTABLE}\Z", description="a wheel of Spotjax to install; empty: from the index")
    ] = ""
    index_url: Annotated[
        str, Meta(pattern=r"^(https?://[^\s@]+)?\Z", description="package index for pip; empty: pip's own")
    ] = ""
    find_links: Annotated[
        str,
        Meta(pattern=rf"^{PRINTABLE}\Z", description="directory or page of wheels to install from, without an index"),
    ] = ""
    constraints: Annotated[str, Meta(pattern=rf"^{PRINTABLE}\Z", description="constraints file for pip")] = ""
    system_packages: Annotated[bool, Meta(description="use the Python packages that the machine's image has")] = False
    python: Annotated[
        str, Meta(pattern=r"^(/[\w./+-]+)?\Z", description="Python to use; empty: one that fits is found or installed")
    ] = ""
    image: Annotated[
        str, Meta(pattern=rf"^({IMAGE})?\Z", description="container image of Spotjax to run; empty: install with pip")
    ] = ""
    user: Annotated[
        str, Meta(pattern=r"^[a-z_][a-z0-9_-]{0,30}\Z", description="system user to make and to run the worker as")
    ] = "spotjax"
    join_token: Annotated[
        str, Meta(pattern=rf"^{PRINTABLE}\Z", description="where the machine gets the fleet's join token")
    ] = ""
    tls_certificate: Annotated[
        str, Meta(pattern=rf"^{PRINTABLE}\Z", description="where the machine gets the worker's certificate")
    ] = ""
    tls_key: Annotated[str, Meta(pattern=rf"^{PRINTABLE}\Z", description="where it gets its private key")] = ""
    tls_authority: Annotated[str, Meta(pattern=rf"^{PRINTABLE}\Z", description="where it gets the authority")] = ""
    join_minutes: Annotated[
        int, Meta(ge=0, le=1440, description="after which a machine that has not joined shuts down; 0: never")
    ] = 20
    settings: dict[str, str | int | float | bool] = {}
    """More settings of the worker, by their names in a settings file."""


FIELDS: dict[str, Any] = get_type_hints(BootstrapOptions, include_extras=True)


def accelerator(platform: Platform, options: BootstrapOptions) -> Accelerator:
    """Which jax is installed."""
    return ACCELERATORS.get(platform, "cuda13") if options.accelerator == "auto" else options.accelerator


def checked(platform: Platform, options: BootstrapOptions) -> BootstrapOptions:
    """The options, if they are in range and go together on that platform.

    Raises:
      ConfigError: they are not; names which.
    """
    try:
        options = msgspec.convert(msgspec.to_builtins(options), BootstrapOptions, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bootstrap: {error}") from error
    defaults = BootstrapOptions(join=options.join)
    for name in UNFIT.get(platform, ()):
        if _differs(options, defaults, name):
            raise ConfigError(f"{name} ({getattr(options, name)}) has no meaning on {platform}")
    if accelerator(platform, options) == "tpu" and platform != "tpu":
        raise ConfigError(f"accelerator (tpu) has no meaning on {platform}: TPUs are rented as platform tpu")
    if platform == "tpu" and accelerator(platform, options) not in ("tpu", "cpu"):
        raise ConfigError(f"accelerator ({options.accelerator}) has no meaning on a TPU VM")
    if options.image and (unfit := [name for name in INSTALLATION if _differs(options, defaults, name)]):
        raise ConfigError(f"{unfit[0]} has no meaning beside image ({options.image}), in which all is installed")
    if options.find_links and options.index_url:
        raise ConfigError(f"find_links ({options.find_links}) installs without an index, so index_url has no meaning")
    if options.wheel and not options.wheel.endswith(".whl"):
        raise ConfigError(f"wheel ({options.wheel}) must be a file NAME.whl")
    for name in ("wheel", "constraints", "join_token", *TLS):
        if platform != "slurm" and getattr(options, name):
            place(getattr(options, name), name)
    if any(getattr(options, name) for name in TLS) and (missing := [n for n in TLS if not getattr(options, n)]):
        raise ConfigError(f"TLS needs all of {', '.join(TLS)}; {' and '.join(missing)} is missing")
    if not (options.join_token or options.tls_certificate or options.settings.get("insecure")):
        raise ConfigError(
            "join_token must say where machines get the fleet's join token, which spotjax keys join-token makes, such "
            "as from a secret store; or they get certificates (tls_certificate), or the setting insecure"
        )
    _check_settings(options.settings)
    return options


def _differs(options: BootstrapOptions, defaults: BootstrapOptions, name: str) -> bool:
    return bool(getattr(options, name) != getattr(defaults, name))


def _check_settings(settings: dict[str, str | int | float | bool]) -> None:
    from spotjax.settings import checked as checked_setting
    from spotjax.settings import refuse_unknown

    refuse_unknown(settings, TYPES, "settings of bootstrap")
    for name, value in settings.items():
        if name in DECIDED:
            raise ConfigError(f"setting {name} follows from the other options, or is found out on the machine")
        if "worker" not in where_of(name):
            raise ConfigError(f"setting {name} has no meaning for a worker")
        checked_setting(name, value, f"setting {name}", strict=True)
