"""The file of API keys: TOML, a table for every key by its name. Reads, checks and writes it.

    [alice]
    hash = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    role = "user"
    requests_per_minute = 60

Keys are made here, 256 random bits each, and never chosen by people: so their plain SHA-256 is all that is kept. Slow
hashes such as scrypt protect what can be guessed, and would cost every request their time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from spotjax.api.access.callers import Caller, CallerLimits, Role
from spotjax.errors import ConfigError

NAME = r"^[A-Za-z0-9_-]{1,64}\Z"
KEY_MARK, TOKEN_MARK = "sjx-key-", "sjx-join-"
"""What keys and join tokens begin with, so that scanners find those that leak."""

Count = Annotated[int, Meta(ge=0)]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as the file has it.

    Attributes:
      hash: of the key.
      role: what it may do.
      requests_per_minute, concurrent_requests, tokens_per_minute, tokens_per_day: see ``CallerLimits``.
      models: that it may use; empty for all.
      expires: when it ends, with an offset from UTC.
      disabled: does not count for now.
    """

    hash: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
    role: Role = Role.USER
    requests_per_minute: Count = 0
    concurrent_requests: Count = 0
    tokens_per_minute: Count = 0
    tokens_per_day: Count = 0
    models: tuple[str, ...] = ()
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    disabled: bool = False

    def caller(self, name: str) -> Caller:
        """Who shows this key."""
        limits = {field: getattr(self, field) for field in CallerLimits.__dataclass_fields__}
        return Caller(name, self.role, CallerLimits(**limits), self.models)


Keys = Mapping[str, KeyRecord]
"""Records by the names of their keys."""


def new_secret(mark: str) -> str:
    """A new key or token: a mark and 256 random bits."""
    return mark + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What the file has of a key."""
    return f"sha256:{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()}"


def name_of(key: str, keys: Keys) -> str | None:
    """Whose key it is, None if nobody's. Takes the same time wherever, and how well, it matches."""
    found, asked = None, hash_of(key)
    for name, record in keys.items():
        if hmac.compare_digest(record.hash, asked):
            found = name
    return found


def read_keys(path: Path) -> dict[str, KeyRecord]:
    """The keys of a file.

    Raises:
      ConfigError: it cannot be read, or is not as it must be; says where.
    """
    try:
        return parse_keys(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be used: {error}") from error


def parse_keys(text: str) -> dict[str, KeyRecord]:
    """The keys of a file's text. Raises ValueError if it is not as it must be."""
    keys = {name: parsed(name, table) for name, table in tomllib.loads(text).items()}
    hashes = [record.hash for record in keys.values()]
    if len(set(hashes)) < len(hashes):
        raise ValueError("two names have the same key")
    return keys


def parsed(name: str, table: Any) -> KeyRecord:
    """The record of a key. Raises ValueError if it is not as it must be."""
    try:
        msgspec.convert(name, Annotated[str, Meta(pattern=NAME)])
        return msgspec.convert(table, KeyRecord)
    except msgspec.ValidationError as error:
        raise ValueError(f"key {name[:80]!r}: {error}") from error


def written(keys: Keys) -> str:
    """The text of a file with these keys; ``parse_keys`` gives them back."""
    return "\n".join(f"[{name}]\n{_table(record)}" for name, record in sorted(keys.items()))


def _table(record: KeyRecord) -> str:
    defaults = KeyRecord(hash=record.hash)
    values = {name: getattr(record, name) for name in KeyRecord.__struct_fields__}
    return "".join(
        f"{name} = {_toml(value)}\n"
        for name, value in values.items()
        if name in ("hash", "role") or value != getattr(defaults, name)
    )


def _toml(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_private(path: Path, text: str, *, replace: bool) -> None:
    """Writes a file that only its owner may read, as a whole or not at all.

    Raises:
      ConfigError: it cannot be written, or is there and not to be replaced.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            beside.replace(path)
        else:
            os.link(beside, path)
            beside.unlink()
    except FileExistsError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} exists; remove it first, or name another file") from error
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error
