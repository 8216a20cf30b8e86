"""Every setting of a server: one struct whose fields are also its flags, its environment and the keys of its file.

``kv_pages`` is ``--kv-pages``, ``SPOTJAX_KV_PAGES`` and ``kv_pages = ...`` in the TOML file that ``--config`` names.
A flag beats the environment, which beats the file, which beats the default. Unknown names are refused.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from spotjax.errors import ConfigError

PREFIX = "SPOTJAX_"
OTHER_VARIABLES = frozenset({"SPOTJAX_CACHE"})
"""Variables that are no settings of a server: the directory for fetched models."""

ADDRESS = r"^(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+):\d{1,5}$"
MESH = r"^(auto|[1-9]\d*x[1-9]\d*x[1-9]\d*)$"


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a server. ``load`` checks them."""

    model: Annotated[
        str,
        Meta(min_length=1, description="tiny, the name of a fetched model, a directory, a .gguf file or hf://org/name"),
    ] = "tiny"
    listen: Annotated[str, Meta(pattern=ADDRESS, description="HOST:PORT to serve gRPC on; port 0 takes a free one")] = (
        "127.0.0.1:8470"
    )
    instances: Annotated[int, Meta(ge=1, description="instances that the local devices are divided into")] = 4
    devices_per_instance: Annotated[int, Meta(ge=1, description="devices of each instance")] = 2
    mesh: Annotated[
        str, Meta(pattern=MESH, description="DATAxSTAGExTENSOR such as 2x2x1; auto lets the planner choose")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="of parameters and KV; auto: float32 on CPU, bfloat16 on accelerators"),
    ] = "auto"
    max_model_len: Annotated[
        int, Meta(ge=0, description="positions for prompt and output; 0: the model's own limit, at most 4096")
    ] = 0
    max_batch: Annotated[int, Meta(ge=1, description="sequences decoded at once by one replica")] = 32
    prefill_tokens: Annotated[int, Meta(ge=1, description="token budget of one prefill step")] = 256
    page_size: Annotated[int, Meta(ge=1, description="token positions in one page of KV")] = 16
    kv_pages: Annotated[
        int, Meta(ge=0, description="pages of KV in one replica; 0: room for max_batch sequences of 512 positions")
    ] = 0
    queue_limit: Annotated[int, Meta(ge=1, description="waiting requests from which on new ones are refused")] = 1024
    retain_seconds: Annotated[float, Meta(ge=0, description="how long a finished request can be resumed")] = 600.0
    drain_seconds: Annotated[
        float, Meta(ge=0, description="how long running requests may go on after SIGTERM or Ctrl-C")
    ] = 30.0
    instance_memory_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="memory of one instance's devices together; 0: what the devices report, on virtual devices so "
            "much that the model needs several of them",
        ),
    ] = 0
    fuse: Annotated[bool, Meta(description="compile whole stages in the background")] = True
    compilation_cache: Annotated[
        str, Meta(description="directory for compiled programs; empty: one in the user's cache directory; off: none")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severity that is logged")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="log lines for people or for machines, on standard error")
    ] = "text"


TYPES: dict[str, Any] = get_type_hints(ServeConfig, include_extras=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and a flag for every setting."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with settings, such as kv_pages = 512")
    for setting in msgspec.structs.fields(ServeConfig):
        kind, meta = get_args(TYPES[setting.name])
        options: dict[str, Any] = {"dest": setting.name, "default": None}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices := get_args(kind):
            options["choices"] = choices
        else:
            options["metavar"] = kind.__name__.upper()
        shown = "" if setting.default == "" else f" (default: {shown_value(setting.default)})"
        help_text = f"{meta.description}{shown}".replace("%", "%%")
        parser.add_argument(f"--{setting.name.replace('_', '-')}", help=help_text, **options)


def load(arguments: argparse.Namespace, environment: Mapping[str, str]) -> ServeConfig:
    """The settings that flags, environment and file come to.

    Raises:
      ConfigError: the file cannot be read, a name is unknown, or a value is out of range; names it.
    """
    settings: dict[str, Any] = {}
    if arguments.config is not None:
        settings |= from_file(arguments.config)
    settings |= from_environment(environment)
    for name in TYPES:
        if (value := getattr(arguments, name)) is not None:
            settings[name] = checked(name, value, f"--{name.replace('_', '-')}")
    return ServeConfig(**settings)


def from_file(path: Path) -> dict[str, Any]:
    """Settings of a TOML file."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as TOML: {error}") from error
    refuse_unknown(table, TYPES, str(path))
    return {name: checked(name, value, f"{name} in {path}", strict=True) for name, value in table.items()}


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings of ``SPOTJAX_*`` variables."""
    ours = {name for name in environment if name.startswith(PREFIX)} - OTHER_VARIABLES
    settings = {f"{PREFIX}{name.upper()}": name for name in TYPES}
    refuse_unknown(sorted(ours), settings, "the environment")
    return {settings[name]: checked(settings[name], environment[name], name) for name in sorted(ours)}


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"unknown setting {name} in {where}; {hint}")


def checked(name: str, value: Any, source: str, strict: bool = False) -> Any:
    """The value of a setting; text is converted unless ``strict``. Raises ConfigError naming the source."""
    try:
        return msgspec.convert(value, TYPES[name], strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}, got {value!r}") from error


def shown_value(value: Any) -> str:
    """A default as help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
