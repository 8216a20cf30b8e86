"""Writes any model that can be opened as a checkpoint that workers boot from by slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from spotjax.checkpoint.completion import complete
from spotjax.checkpoint.parameters import ParameterWriter
from spotjax.errors import CheckpointError
from spotjax.models.catalog import Model
from spotjax.models.orbax_checkpoint import is_checkpoint
from spotjax.models.orbax_manifest import is_url, itemsize
from spotjax.models.orbax_part import StoredPart, make_context


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done.

    Attributes:
      parts: of the checkpoint.
      kept: parts that an interrupted conversion had left.
      bytes: of all parameters as they are stored.
    """

    parts: int
    kept: int
    bytes: int


def convert(
    model: Model,
    location: str,
    dtype: str = "float32",
    verify: bool = True,
    progress: Callable[[str, int], None] = lambda part, count: None,
) -> Conversion:
    """Converts a model, part by part, and goes on where an interrupted conversion to the same place stopped.

    Args:
      model: to convert; what is quantized is written so.
      location: directory to write, which may exist if it is empty or holds such a conversion.
      dtype: to store parameters as, ``float32`` or ``bfloat16``.
      verify: whether every part is read back and compared.
      progress: is told the part and how many bytes more of it are done, each byte once.

    Raises:
      CheckpointError: the directory is in use for something else, or something cannot be read, written or verified.
    """
    _check_target(location)
    checkpoint, kept, total = model.checkpoint, 0, 0
    spec = checkpoint.spec
    writer = ParameterWriter(location, spec.config, dtype, spec.quantization)
    try:
        for part, arrays in writer.parts.items():
            sources = {array.name: partial(checkpoint.read, array.name) for array in arrays.values()}
            record = writer.written(part, sources)
            if record is not None:
                kept += 1
                progress(part, record.bytes)
            else:
                record = writer.write(part, sources, partial(progress, part))
            if verify:
                StoredPart(location, part, record, make_context()).verify()
            total += record.bytes
    finally:
        writer.close()
    complete(location, spec.config, dtype, model.tokenizer.files(), quantization=spec.quantization)
    return Conversion(len(writer.parts), kept, total)


def stored_bytes(model: Model, dtype: str) -> int:
    """Bytes that the parameters of a model take."""
    return replace(model.checkpoint.spec, dtype_bytes=itemsize(dtype)).parameter_bytes


def _check_target(location: str) -> None:
    if is_url(location):
        return
    directory = Path(location).expanduser()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{location} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not is_checkpoint(directory):
        raise CheckpointError(f"{location} holds other files; name a directory that is empty or does not exist")
