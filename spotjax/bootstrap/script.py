"""Writes what makes a fresh machine a worker: a start-up script, or a batch job."""

from __future__ import annotations

import hashlib
import math
import shlex
from dataclasses import dataclass
from typing import Any

from spotjax.bootstrap.options import BootstrapOptions, Platform, accelerator, checked
from spotjax.bootstrap.places import Access, place
from spotjax.bootstrap.rendering import Verbatim, render, shell, toml
from spotjax.config import TLS
from spotjax.errors import ConfigError

STOP_MARGIN = 5
"""Seconds beyond the grace before the init system kills a worker."""
ABANDONED_SECONDS = 3600.0
"""Without a controller, after which a worker ends, and its machine with it."""
USER_DATA_LIMIT = 16384
"""Bytes that AWS takes as user data."""
ENGINE = "/usr/bin/docker"
DIRECTORY = "/etc/spotjax"


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that the script fetches: from where, to where, with which permissions."""

    access: Access
    location: str
    target: str
    mode: str


def script(platform: Platform, options: BootstrapOptions) -> str:
    """What to give to machines of that platform.

    Returns:
      For ``gce``, ``tpu`` and ``aws`` a Bash script, run as root at every boot (``aws``: at the first one); for
      ``slurm`` a batch script. It ends in a newline and contains no secret.

    Raises:
      ConfigError: the options are out of range, or do not go together.
    """
    options = checked(platform, options)
    if platform == "slurm":
        return render("slurm.sh.j2", shell, _batch_values(options))
    text = render("worker.sh.j2", shell, _machine_values(platform, options))
    if platform == "aws" and (size := len(text.encode())) > USER_DATA_LIMIT:
        raise ConfigError(f"the script has {size} bytes, and AWS takes {USER_DATA_LIMIT}: give shorter options")
    return text


def stop_seconds(options: BootstrapOptions) -> int:
    """Seconds from SIGTERM after which a worker is killed."""
    return math.ceil(options.grace_seconds) + STOP_MARGIN


def settings_file(options: BootstrapOptions, trust: dict[str, str], **more: Any) -> str:
    """What of ``worker.toml`` is the same on all machines, without a newline at its end."""
    times = {"grace_seconds": float(options.grace_seconds), "abandoned_seconds": ABANDONED_SECONDS}
    settings = {"join": options.join, **more, **times, **trust, **options.settings}
    return "\n".join(f"{name} = {toml(value)}" for name, value in settings.items())


def _machine_values(platform: Platform, options: BootstrapOptions) -> dict[str, Any]:
    kind = accelerator(platform, options)
    trust = {name: f"{DIRECTORY}/{name.removeprefix('tls_')}.pem" for name in TLS if options.tls_certificate}
    if options.join_token:
        trust["join_token"] = f"{DIRECTORY}/join-token"
    fetched = _fetched(options, trust)
    accesses = {file.access for file in fetched}
    for access in accesses:
        if platform != "aws" and access.startswith("aws"):
            raise ConfigError(f"s3:// and ssm: need a machine of AWS, this is one of {platform}")
        if platform == "aws" and access.startswith("google"):
            raise ConfigError("gs:// and secret: need a machine of Google, this is one of aws")
    pip = _pip(options, kind)
    return {
        "platform": platform,
        "version": options.version,
        "join": options.join,
        "name": options.name,
        "zone": options.zone,
        "price_class": options.price_class,
        "user": options.user,
        "join_minutes": options.join_minutes,
        "image": options.image,
        "engine": ENGINE,
        "secrets": bool(accesses & {"google", "google-secret", "aws", "aws-parameter"}),
        "aws": bool(accesses & {"aws", "aws-parameter"}),
        "accesses": accesses | ({"google"} if "google-secret" in accesses else set()),
        "python": options.python,
        "fetched": fetched,
        "system_packages": options.system_packages,
        "pip": Verbatim(shlex.join(pip)),
        "installed": hashlib.sha256(repr((pip, options.system_packages, options.python)).encode()).hexdigest()[:16],
        "accelerator": kind,
        "settings": settings_file(options, trust),
        "data_port": options.data_port,
        "unit": _unit(options, kind),
    }


def _fetched(options: BootstrapOptions, trust: dict[str, str]) -> list[Fetched]:
    files = []
    for name in ("wheel", "constraints"):
        if text := getattr(options, name):
            there = place(text, name)
            files.append(Fetched(there.access, there.location, _target(name, text), "644"))
    for name, target in trust.items():
        there = place(getattr(options, name), name)
        secret = name in ("tls_key", "join_token")
        files.append(Fetched(there.access, there.location, target, "400" if secret else "644"))
    return files


def _target(name: str, text: str) -> str:
    """Where a wheel or constraints file is put; a wheel must keep its name, which says what it is."""
    return f"/opt/spotjax/{place(text, name).file_name if name == 'wheel' else 'constraints.txt'}"


def _pip(options: BootstrapOptions, kind: str) -> list[str]:
    """Arguments of ``pip install``."""
    arguments = []
    if options.constraints:
        arguments += ["--constraint", _target("constraints", options.constraints)]
    if options.index_url:
        arguments += ["--index-url", options.index_url]
    if options.find_links:
        arguments += ["--no-index", "--find-links", options.find_links]
    if options.wheel:
        arguments.append(_target("wheel", options.wheel))
    else:
        arguments.append(f"spotjax=={options.version}")
    return arguments if kind == "cpu" else [*arguments, f"jax[{kind}]"]


def _unit(options: BootstrapOptions, kind: str) -> str:
    state, cache = "/var/lib/spotjax", "/var/cache/spotjax"
    flags = [
        "--network host", "--ipc host", "--user @OWNER@", f"--volume {DIRECTORY}:{DIRECTORY}:ro",
        f"--volume {state}:{state}", f"--volume {cache}:{cache}", f"--env HOME={state}", f"--env SPOTJAX_CACHE={cache}",
        f"--stop-timeout {stop_seconds(options)}",
    ]  # fmt: skip
    if kind != "cpu":
        flags.append("--privileged" if kind == "tpu" else "--gpus all")
    return render(
        "worker.service.j2",
        str,  # every value fits a pattern that leaves nothing to quote
        {
            "user": options.user,
            "image": options.image,
            "engine": ENGINE,
            "container_flags": " ".join(flags),
            "cuda": kind.startswith("cuda"),
            "power_off": options.join_minutes > 0,
            "stop_seconds": stop_seconds(options),
        },
    ).rstrip("\n")


def _batch_values(options: BootstrapOptions) -> dict[str, Any]:
    trust = {name: path for name in (*TLS, "join_token") if (path := getattr(options, name))}
    for name, path in trust.items():
        if not path.startswith("/"):
            raise ConfigError(f"{name} is {path!r}; on slurm it must be a path that all nodes see")
    price_class = "spot" if options.price_class == "auto" else options.price_class
    listen = {"data_listen": f"0.0.0.0:{options.data_port}", "price_class": price_class}
    return {
        "version": options.version,
        "zone": options.zone,
        "python": options.python,
        "settings": settings_file(options, trust, **listen),
        "stop_seconds": stop_seconds(options),
    }
