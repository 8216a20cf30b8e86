"""``spotjax keys``: API keys of callers, and the token that workers join with."""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spotjax.commands.arguments import add_command
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

LIMITS = ("requests_per_minute", "concurrent_requests", "tokens_per_minute", "tokens_per_day")
EXAMPLES = """\
  spotjax keys add alice keys.toml --requests-per-minute 60 --tokens-per-day 1000000
  spotjax keys add oncall keys.toml --role admin
  spotjax keys list keys.toml
  spotjax keys remove alice keys.toml
  spotjax keys join-token join-token                a file for the setting join_token

A server that runs with --api-keys keys.toml follows the file. A key is shown once; the file has only its hash.
"""


def add_commands(commands: Commands) -> None:
    """Adds the commands."""
    keys = add_command(commands, "keys", run_list, "make API keys and join tokens", EXAMPLES)
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = add_command(actions, "add", run_add, "make a key and print it, this once")
    add.add_argument("name", metavar="NAME", help="of the key: letters, digits, _ and -")
    add.add_argument("--role", choices=("user", "viewer", "admin"), default="user", help="what it may do")
    for limit in LIMITS:
        flag = f"--{limit.replace('_', '-')}"
        add.add_argument(flag, type=int, default=0, metavar="COUNT", help="at most (default: 0, no limit)")
    add.add_argument("--model", action="append", default=[], metavar="MODEL", help="that it may use (default: all)")
    add.add_argument("--expires", metavar="TIME", help="such as 2027-01-31T00:00:00+00:00 (default: never)")
    listing = add_command(actions, "list", run_list, "show the keys of a file")
    listing.add_argument("--json", action="store_true", help="print JSON instead of text, one value a line")
    remove = add_command(actions, "remove", run_remove, "remove a key")
    remove.add_argument("name", metavar="NAME", help="of the key")
    for parser in (add, listing, remove):
        parser.add_argument("file", metavar="FILE", type=Path, help="of keys, for the setting api_keys")
    token = add_command(actions, "join-token", run_join_token, "make a token that workers join with")
    token.add_argument("file", metavar="FILE", type=Path, help="to write it to; must not exist")


def run_add(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax keys add``."""
    from spotjax.api.access.key_file import KEY_MARK, hash_of, new_secret, parsed, read_keys, write_private, written

    key = new_secret(KEY_MARK)
    table: dict[str, Any] = {limit: getattr(arguments, limit) for limit in LIMITS}
    table |= {"hash": hash_of(key), "role": arguments.role, "models": arguments.model}
    if arguments.expires:
        table["expires"] = time_of(arguments.expires)
    try:
        record = parsed(arguments.name, table)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with alone(arguments.file):
        keys = read_keys(arguments.file) if arguments.file.exists() else {}
        if arguments.name in keys:
            raise ConfigError(f"{arguments.file} has a key {arguments.name}; remove it first, or choose another name")
        write_private(arguments.file, written(keys | {arguments.name: record}), replace=True)
    print(key)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax keys list``."""
    from spotjax.api.access.key_file import read_keys
    from spotjax.commands.output import print_json

    for name, record in sorted(read_keys(arguments.file).items()):
        values = {f: getattr(record, f) for f in record.__struct_fields__ if f != "hash"}
        if arguments.json:
            print_json({"name": name, **values, "expires": record.expires and record.expires.isoformat()})
            continue
        shown = [f"{field}={shown_value(value)}" for field, value in values.items() if value and field != "role"]
        print(" ".join([name, str(record.role), *shown]))
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax keys remove``."""
    from spotjax.api.access.key_file import read_keys, write_private, written

    with alone(arguments.file):
        keys = read_keys(arguments.file)
        if keys.pop(arguments.name, None) is None:
            raise ConfigError(f"{arguments.file} has no key {arguments.name}; there are {', '.join(keys) or 'none'}")
        write_private(arguments.file, written(keys), replace=True)
    return 0


def run_join_token(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax keys join-token``."""
    from spotjax.api.access.key_file import TOKEN_MARK, new_secret, write_private

    write_private(arguments.file, new_secret(TOKEN_MARK) + "\n", replace=False)
    return 0


def time_of(text: str) -> datetime:
    """A time with an offset. Raises ConfigError for anything else."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--expires: {error}") from error
    if time.tzinfo is None:
        raise ConfigError(f"--expires: {text} lacks an offset from UTC, such as +00:00")
    return time


def shown_value(value: Any) -> str:
    """A value of a record, for people."""
    if isinstance(value, datetime):
        return value.isoformat()
    return ",".join(value) if isinstance(value, tuple) else str(value)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets nobody else change a file of keys meanwhile; its directory is what is locked, for the file is replaced."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
