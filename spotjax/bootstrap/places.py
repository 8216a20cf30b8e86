"""Where a file is that a fresh machine fetches for itself: on it, on the web, in a bucket or a secret store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, urlsplit

from spotjax.errors import ConfigError

Access = Literal["file", "web", "google", "google-secret", "aws", "aws-parameter"]
KNOWN = "a path, https://..., gs://BUCKET/OBJECT, secret:projects/P/secrets/S[/versions/V], s3://BUCKET/KEY or ssm:NAME"
SECRET = re.compile(r"projects/[\w.:-]+/secrets/[\w-]+(/versions/\w+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """A place as the script takes it.

    Attributes:
      access: who is asked, and as whom.
      location: a path, a URL, or what the ``aws`` command calls it.
    """

    access: Access
    location: str

    @property
    def file_name(self) -> str:
        """The last part of its path."""
        return urlsplit(self.location).path.rpartition("/")[2] if "://" in self.location else self.location.rpartition(
            "/"
        )[2]  # fmt: skip


def place(text: str, what: str) -> Place:
    """Reads a place.

    Args:
      text: as a user writes it.
      what: which option it is, for the message.

    Raises:
      ConfigError: it is none of the known kinds, or has a password in it, which a script must not have.
    """
    if text.startswith("/"):
        return Place("file", text)
    scheme, _, rest = text.partition(":")
    parts = urlsplit(text)
    if scheme == "file" and parts.path.startswith("/") and not parts.netloc:
        return Place("file", parts.path)
    if scheme in ("https", "http") and parts.hostname:
        if parts.username or parts.password:
            raise ConfigError(f"{what}: a URL with a password would be readable in the script; use a secret store")
        return Place("web", text)
    if scheme in ("gs", "s3") and parts.netloc and len(parts.path) > 1:
        if scheme == "s3":
            return Place("aws", text)
        return Place("google", f"https://storage.googleapis.com/{quote(parts.netloc)}{quote(parts.path)}")
    if scheme == "secret" and SECRET.fullmatch(rest):
        version = rest if "/versions/" in rest else f"{rest}/versions/latest"
        return Place("google-secret", f"https://secretmanager.googleapis.com/v1/{version}:access")
    if scheme == "ssm" and rest:
        return Place("aws-parameter", rest)
    raise ConfigError(f"{what} is {text!r}; it must be {KNOWN}")
