"""What of a checkpoint the server's process writes itself: all but parameters and KV, which are on devices.

Its generation state is written by a child process: Orbax needs jax, and the controller is to have none.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from spotjax.checkpoint import save_generation
from spotjax.checkpoint.saves import GENERATION
from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig
from spotjax.models.quantization import Quantization

PROGRAM = save_generation.__name__
PROGRAM_SECONDS = 120.0
"""After which a child that writes generation state is given up: its disk hangs."""


class TokenizerFiles(Protocol):
    """As much of a tokenizer as is needed here."""

    def files(self) -> Mapping[str, bytes]:
        """Name and contents of each file that it can be opened from."""
        ...


class CheckpointFiles:
    """Of one service.

    Args:
      config: of its model.
      dtype: that it is served at, and saved as.
      model: fingerprint of the weights at that dtype.
      tokenizer: of the model.
      log: directory of the commit log; None if it is in memory.
      quantization: of what is served and saved.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: str,
        model: str,
        tokenizer: TokenizerFiles,
        log: Path | None,
        quantization: Quantization = "none",
    ) -> None:
        self._config, self._dtype, self._model, self._tokenizer, self._log = config, dtype, model, tokenizer, log
        self._quantization = quantization

    async def require_free(self, directory: str) -> None:
        """Raises CheckpointError if there is a complete checkpoint."""
        from spotjax.checkpoint.completion import check_incomplete  # tensorstore, which a server may never need

        await asyncio.to_thread(check_incomplete, directory)

    def require_log(self) -> Path:
        """The commit log's directory.

        Raises:
          CheckpointError: there is none.
        """
        if self._log is None:
            raise CheckpointError("durability none keeps no commit log whose state could be saved; ask for parameters")
        return self._log

    async def complete(self, directory: str) -> None:
        """Makes the parts that instances have written a checkpoint.

        Raises:
          CheckpointError: some are missing or of another model, or it cannot be written.
        """
        from spotjax.checkpoint.completion import complete

        work = (directory, self._config, self._dtype, self._tokenizer.files(), self._model, self._quantization)
        await asyncio.to_thread(complete, *work)

    async def save_generation(self, save: str) -> int:
        """Saves what the commit log has, as it is at one moment, beside a save of KV. Returns: how many requests.

        Raises:
          CheckpointError: it cannot be written.
        """
        command = (sys.executable, "-m", PROGRAM, str(self.require_log()), save + GENERATION)
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
        )
        try:
            output, errors = await asyncio.wait_for(child.communicate(), PROGRAM_SECONDS)
        except TimeoutError:
            raise CheckpointError(f"generation state was not written within {PROGRAM_SECONDS:g} s") from None
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if child.returncode:
            said = errors.decode(errors="replace").strip().splitlines()
            raise CheckpointError(said[-1] if said else f"generation state: the program ended with {child.returncode}")
        return msgspec.json.decode(output, type=save_generation.Done).requests
