"""Where the settings of a server come from: flags, environment, a file.

``kv_pages`` is ``--kv-pages``, ``SPOTJAX_KV_PAGES`` and ``kv_pages = ...`` in the TOML file that ``--config`` names.
A flag beats the environment, which beats the file, which beats the default. Unknown names are refused, and so are
settings without meaning beside the others. What settings there are is in ``spotjax.config``.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from spotjax.config import SHOWN, TYPES, ServeConfig, refuse_contradictions, where_of
from spotjax.errors import ConfigError

PREFIX = "SPOTJAX_"
PARENT = "SPOTJAX_PARENT"
API_KEY = "SPOTJAX_API_KEY"
OTHER_VARIABLES = frozenset({"SPOTJAX_CACHE", PARENT, "SPOTJAX_FLEET", "SPOTJAX_TYPE", API_KEY})
"""Variables that are no settings of a server: the directory for fetched models, the process that a worker dies with,
what programs that rent machines are told besides settings of a worker, and a client's API key."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and a flag for every setting."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with settings, such as kv_pages = 512")
    for setting in msgspec.structs.fields(ServeConfig):
        kind, meta = get_args(TYPES[setting.name])
        where = SHOWN[where_of(setting.name)]
        options: dict[str, Any] = {"dest": setting.name, "default": None}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices := get_args(kind):
            options["choices"] = choices
        else:
            options["metavar"] = kind.__name__.upper()
        default = "" if setting.default == "" else f"default: {shown_value(setting.default)}"
        notes = "; ".join(filter(None, (where, default)))
        help_text = f"{meta.description} ({notes})" if notes else meta.description
        parser.add_argument(flag_of(setting.name), help=help_text.replace("%", "%%"), **options)


def load(arguments: argparse.Namespace, environment: Mapping[str, str]) -> ServeConfig:
    """The settings that flags, environment and file come to.

    Raises:
      ConfigError: the file cannot be read, a name is unknown, a value is out of range, or two settings contradict each
        other; names them.
    """
    settings: dict[str, Any] = {}
    if arguments.config is not None:
        settings |= from_file(arguments.config)
    settings |= from_environment(environment)
    for name in TYPES:
        if (value := getattr(arguments, name)) is not None:
            settings[name] = checked(name, value, flag_of(name))
    config = ServeConfig(**settings)
    refuse_contradictions(config)
    return config


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


def flag_of(name: str) -> str:
    """``--kv-pages``."""
    return f"--{name.replace('_', '-')}"


def shown_value(value: Any) -> str:
    """A default as help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
