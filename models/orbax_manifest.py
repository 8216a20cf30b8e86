"""What a checkpoint directory of Spotjax consists of, and the manifest that says so. Reads and writes no parameters.

    manifest.json        written last: a directory without it is incomplete
    parameters/<part>/   one Orbax checkpoint (OCDBT, zarr3) for what is before the layers, each layer, what is after
    tokenizer/           what ``Tokenizer.from_directory`` reads

All is reached through tensorstore's key-value stores, so a directory may as well be in a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig
from spotjax.models.quantization import Quantization
from spotjax.models.spec import INPUTS, ArraySpec, ModelSpec

FORMAT = 1
MANIFEST = "manifest.json"
PARAMETERS = "parameters"
TOKENIZER = "tokenizer"
OCDBT_MANIFEST = "manifest.ocdbt"
"""Of each part: small, and by the random names of the files that it points to unlike that of any other part."""
DTYPES = ("float32", "bfloat16")
"""What parameters are stored as."""
REMEDY = "restore the directory from a copy, or save or convert the model again"
"""What to do about damage."""


class StoredArray(msgspec.Struct, frozen=True):
    """One array of a part.

    Attributes:
      shape: of the whole array.
      chunk: extents of what is read at once.
      checksum: XXH3 of the contents of all chunks, in order, without padding; hexadecimal.
      samples: by dtype, the array's part in a fingerprint when it is served at that dtype; none of scales.
      dtype: if it is another than that of its part.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    checksum: str
    samples: dict[str, str]
    dtype: str = ""


class Part(msgspec.Struct, frozen=True):
    """One Orbax checkpoint.

    Attributes:
      dtype: of all its arrays that do not say otherwise.
      arrays: by name within the part.
      checksum: XXH3 of its ``manifest.ocdbt``, hexadecimal.
    """

    dtype: str
    arrays: dict[str, StoredArray]
    checksum: str

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return sum(int(np.prod(array.shape)) * itemsize(array.dtype or self.dtype) for array in self.arrays.values())


class Manifest(msgspec.Struct, frozen=True):
    """The whole checkpoint.

    Attributes:
      config: of the model.
      dtype: of all parameters that are not quantized.
      parts: by name.
      tokenizer: XXH3 of each file in ``tokenizer/``, hexadecimal.
      quantization: of the others.
    """

    config: DecoderConfig
    dtype: str
    parts: dict[str, Part]
    tokenizer: dict[str, str]
    quantization: Quantization = "none"

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the arrays."""
        return ModelSpec(self.config, itemsize(self.dtype), self.quantization)


class _Sealed(msgspec.Struct):
    """``manifest.json``: the contents, still encoded, under their format and checksum."""

    format: int
    checksum: str
    manifest: msgspec.Raw


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def checksum(content: Any) -> str:
    """XXH3 of a buffer, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(content)


def parts_of(spec: ModelSpec) -> dict[str, dict[str, ArraySpec]]:
    """The parts of a model's checkpoint, in order, and the arrays of each by their name within the part."""
    parts: dict[str, dict[str, ArraySpec]] = {}
    for array in spec.parameters:
        part, name = place_of(array)
        parts.setdefault(part, {})[name] = array
    return parts


def place_of(array: ArraySpec) -> tuple[str, str]:
    """The part that an array is in, and its name there."""
    if array.layer is not None:
        part = f"layers.{array.layer}"
        return part, array.name.removeprefix(f"{part}.")
    return ("embedding" if array.name in INPUTS else "output"), array.name


def is_url(location: str) -> bool:
    """Whether a location is in a bucket instead of the file system."""
    return "://" in location


def kvstore(location: str, *names: str) -> dict[str, Any] | str:
    """tensorstore's specification of a directory below ``location``, a path or a URL that tensorstore knows."""
    if is_url(location):
        return "/".join([location.rstrip("/"), *names, ""])
    return {"driver": "file", "path": f"{Path(location, *names).expanduser().absolute()}/"}


def encode(manifest: Manifest) -> bytes:
    """The contents of ``manifest.json``."""
    content = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(FORMAT, checksum(content), msgspec.Raw(content)))


def decode(content: bytes, where: str) -> Manifest:
    """The manifest in ``manifest.json``, checked to be of this format, undamaged and of the parts that it needs.

    Args:
      content: of the file.
      where: the checkpoint, for messages.

    Raises:
      CheckpointError: it is not.
    """
    try:
        sealed = msgspec.json.decode(content, type=_Sealed)
        if sealed.format != FORMAT:
            raise CheckpointError(f"{where} has format {sealed.format}, this version of Spotjax reads {FORMAT}")
        if checksum(sealed.manifest) != sealed.checksum:
            raise CheckpointError(f"{where}: {MANIFEST} is damaged, its checksum is wrong; {REMEDY}")
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{where}: {MANIFEST} cannot be read: {error}; {REMEDY}") from error
    check_parts(manifest.spec, manifest.dtype, manifest.parts, where)
    return manifest


def check_parts(spec: ModelSpec, dtype: str, parts: Mapping[str, Part], where: str) -> None:
    """Checks that all parts of the model are there, each with its arrays in their shapes.

    Raises:
      CheckpointError: they are not.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: parameters are {dtype}, only {', '.join(DTYPES)} are read")
    wanted = parts_of(spec)
    if missing := [part for part in wanted if part not in parts]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{where} is incomplete: {shown} of {len(wanted)} parts are missing; save them first")
    for part, arrays in wanted.items():
        found = {name: (array.shape, array.dtype) for name, array in parts[part].arrays.items()}
        described = {name: (array.shape, spec.element_type(array.name) or "") for name, array in arrays.items()}
        if found != described or parts[part].dtype != dtype:
            raise CheckpointError(
                f"{where}: the arrays of {part} are not those that the configuration describes, in {dtype}; {REMEDY}"
            )
