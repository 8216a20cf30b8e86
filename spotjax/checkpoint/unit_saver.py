"""Writes units of KV pages (``kv_units``) with Orbax."""

from __future__ import annotations

import jax
import orbax.checkpoint as ocp
from etils import epath

from spotjax.checkpoint.kv_units import UnitBuffer
from spotjax.errors import ConfigError


class UnitSaver:
    """Writes units; the same one for all of a writer's, as making one takes longer than using it."""

    def __init__(self) -> None:
        if jax.process_count() > 1:  # nor would Orbax write arrays of the host from another one than the first
            raise ConfigError("of a TPU slice with several hosts no host has all kv heads: its KV is not saved")
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))

    def save(self, path: epath.Path, unit: UnitBuffer) -> None:
        """Saves a unit; returns once it is there. Raises whatever Orbax and the file system raise."""
        tree = unit.tree()
        chunks = {leaf: ocp.SaveArgs(shard_axes=(0,) if leaf == "content" else ()) for leaf in tree}
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=chunks))

    def close(self) -> None:
        """Ends its threads."""
        self._checkpointer.close()
