"""The gate that asks for an API key, and follows the file of keys while the server runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from spotjax.api.access.callers import Caller
from spotjax.api.access.key_file import Keys, name_of, read_keys
from spotjax.errors import ConfigError, Unauthenticated

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the file is looked at, while there are calls: a key that is removed ends so soon."""
Stamp = tuple[int, int, int]


class KeyedGate:
    """Knows the callers by their keys.

    Args:
      path: of the file.
      others: keys that are not from the file, by names that no key in it can have.
      clock: monotonic seconds.
      now: what time it is, for keys that expire.

    Raises:
      ConfigError: the file cannot be used. Once it could, a file that cannot any more is logged, and the keys stay as
        they were.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        others: Keys = MappingProxyType({}),
    ) -> None:
        self._path, self._clock, self._now = path, clock, now
        self._stamp, self._looked = self._stamp_now(), clock()
        self._others, self._keys = others, {**read_keys(path), **others}

    def caller_of(self, key: str | None) -> Caller:
        """See ``Gate.caller_of``."""
        if key is None:
            raise Unauthenticated("this server wants an API key: send Authorization: Bearer and the key")
        self._look()
        name = name_of(key, self._keys)
        if name is None:
            raise Unauthenticated("the API key is not known here; it may have been removed")
        record = self._keys[name]
        if record.disabled:
            raise Unauthenticated(f"the API key {name} is disabled")
        if record.expires is not None and record.expires <= self._now():
            raise Unauthenticated(f"the API key {name} expired at {record.expires.isoformat()}")
        return record.caller(name)

    def _look(self) -> None:
        """Reads the file again if it is another one."""
        if self._clock() < self._looked + LOOK_SECONDS:
            return
        self._looked, stamp = self._clock(), self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = {**read_keys(self._path), **self._others}
        except ConfigError as problem:
            log.error("%s; the keys stay as they were", problem)
        else:
            log.info("API keys were read again", extra={"keys": len(self._keys)})

    def _stamp_now(self) -> Stamp | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
