"""Keeps the ledger in a small file: written beside, synced and renamed over the old one, so it is whole at any moment.

Blocking; one process writes it, the one that has the commit log.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from spotjax.engine.log_directory import sync_directory
from spotjax.errors import ConfigError
from spotjax.fleet.capacity.ledger import Ledger

NAME = "spending.json"


class LedgerFile:
    """The ledger's file in a directory that exists.

    Args:
      directory: None keeps nothing: for a service that keeps nothing of its requests either.
    """

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / NAME

    def read(self) -> Ledger:
        """What was written last; an empty ledger if nothing ever was.

        Raises:
          ConfigError: the file is damaged. It is not guessed at, for the caps depend on it.
        """
        if self._path is None or not self._path.exists():
            return Ledger()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Ledger)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{self._path} cannot be read as the account of spending: {error}; what was spent today is not known "
                "without it: restore it, or remove it once you have looked at what the provider lists"
            ) from error

    def write(self, ledger: Ledger) -> None:
        """Writes; when it returns, the file survives the loss of power.

        Raises:
          OSError: it could not be written; the old one is there.
        """
        if self._path is None:
            return
        beside = self._path.with_suffix(".new")
        with open(beside, "wb") as file:
            file.write(msgspec.json.encode(ledger))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)
        sync_directory(self._path.parent)
