"""Which commit log a server writes, by its settings. The log itself is the engine's."""

from __future__ import annotations

from pathlib import Path

from spotjax.config import ServeConfig
from spotjax.engine.commit_log import CommitLog, MemoryCommitLog
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.log_directory import default_directory


def open_commit_log(config: ServeConfig, model: str) -> CommitLog:
    """The log that the settings name, with what it has from before. Blocks.

    Args:
      config: of the server.
      model: fingerprint of the weights that it serves.

    Raises:
      CommitLogError: the log is damaged, in use by another process, or has unfinished requests of another model.
    """
    if config.durability == "none":
        return MemoryCommitLog()
    directory = Path(config.commit_log).expanduser() if config.commit_log else default_directory(config.address)
    return DurableLog.open(directory, config.durability, model)


def directory_of(log: CommitLog) -> Path | None:
    """Where a log is; None if it is in memory."""
    return log.directory if isinstance(log, DurableLog) else None
