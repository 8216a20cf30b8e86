"""How log records become lines: one line for each event on standard error, for people or for machines.

Whatever a record carries in ``extra`` is shown, as ``key=value`` or as JSON keys. Prompts and tokens are never logged
above debug; that is for those who log to keep.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Literal, TextIO

import msgspec

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes that every record has; the others came in ``extra``."""


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What the record carries in ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


class TextLines(logging.Formatter):
    """``2026-01-31T12:00:00Z info spotjax.api listening address=127.0.0.1:8470``."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        parts = [when, record.levelname.lower(), record.name, record.getMessage()]
        parts += [f"{name}={value}" for name, value in fields_of(record).items()]
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        return " ".join(parts).replace("\n", "\\n")


class JsonLines(logging.Formatter):
    """One object with ``time`` (Unix seconds), ``level``, ``logger``, ``message``, ``error`` and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = fields_of(record) | {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def set_up(level: str, form: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Sends all records from ``level`` on to ``stream``, by default standard error, as ``text`` or ``json`` lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("jax", "absl", "asyncio", "grpc", "hf_xet", "urllib3", "httpx"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
