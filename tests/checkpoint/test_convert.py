"""Converting models: the same model afterwards, in little memory, and again after an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import MANY_CHUNKS, random_model, rounded

from spotjax import cli
from spotjax.checkpoint.convert import Conversion, convert, stored_bytes
from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index, whole
from spotjax.models.catalog import Model, cached_path, open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint

SMOLLM2 = "smollm2-135m-instruct"
FLOAT32 = np.dtype(np.float32)
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Héllo  wörld,\n\n it's 2024!"}]
TEXTS = ["Once upon a time, there was a tiny model.", "  spaces\tand\n\nlines ", "naïve 東京 🚀 <|im_end|> 1234567", ""]


def assert_same_weights(found: Model, expected: Model, dtype: str = "float32") -> None:
    assert found.checkpoint.spec == expected.checkpoint.spec
    for array in expected.checkpoint.spec.parameters:
        index = whole(array.shape)
        wanted = rounded(expected.checkpoint.read(array.name, index), dtype)
        np.testing.assert_array_equal(found.checkpoint.read(array.name, index), wanted, err_msg=array.name)


def assert_same_tokenizer(found: Model, expected: Model) -> None:
    ours, theirs = found.tokenizer, expected.tokenizer
    assert (ours.end_tokens, ours.vocab_size) == (theirs.end_tokens, theirs.vocab_size)
    for text in TEXTS:
        for special in (False, True):
            tokens = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == tokens
            assert ours.decode(tokens) == theirs.decode(tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_model_is_the_same_afterwards(tmp_path: Path, dtype: str) -> None:
    told: dict[str, int] = {}

    def progress(part: str, count: int) -> None:
        told[part] = told.get(part, 0) + count

    source = open_model("tiny")
    done = convert(source, str(tmp_path / "model"), dtype, progress=progress)
    total = stored_bytes(source, dtype)
    assert done == Conversion(parts=6, kept=0, bytes=total)
    assert list(told) == ["embedding", "layers.0", "layers.1", "layers.2", "layers.3", "output"]
    assert sum(told.values()) == total
    found = open_model(str(tmp_path / "model"))
    assert_same_weights(found, source, dtype)
    assert_same_tokenizer(found, source)
    served = np.dtype(dtype)
    assert fingerprint(found.checkpoint, served) == fingerprint(source.checkpoint, served)


@pytest.mark.slow
@pytest.mark.skipif(not cached_path(SMOLLM2).is_file(), reason=f"run: spotjax fetch {SMOLLM2}")
def test_a_gguf_model_with_chat_template_is_the_same_afterwards(tmp_path: Path) -> None:
    source = open_model(SMOLLM2)
    convert(source, str(tmp_path))
    found = open_model(str(tmp_path))
    assert_same_weights(found, source)
    assert_same_tokenizer(found, source)
    assert found.tokenizer.render_chat(CHAT) == source.tokenizer.render_chat(CHAT)
    assert fingerprint(found.checkpoint, FLOAT32) == fingerprint(source.checkpoint, FLOAT32)


def test_what_is_converted_may_itself_be_a_converted_model(tmp_path: Path) -> None:
    source = random_model(MANY_CHUNKS)
    convert(source, str(tmp_path / "one"))
    convert(open_model(str(tmp_path / "one")), str(tmp_path / "two"), "bfloat16")
    assert_same_weights(open_model(str(tmp_path / "two")), source, "bfloat16")


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    source = random_model(MANY_CHUNKS)
    convert(source, str(tmp_path / "done"))
    with pytest.raises(
        CheckpointError, match="done is a complete checkpoint already; name another directory or remove"
    ):
        convert(source, str(tmp_path / "done"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; name a directory"):
        convert(source, str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="holds other files; name a directory that is empty or does not exist"):
        convert(source, str(tmp_path))


def interrupted(directory: Path, kill_in: str) -> None:
    """Leaves what a conversion leaves that is killed while it writes that part."""
    program = f"""
import os, signal
from checkpoint_cases import MANY_CHUNKS, random_model
from spotjax.checkpoint.convert import convert
def progress(part, count):
    if part == {kill_in!r}:
        os.kill(os.getpid(), signal.SIGKILL)
convert(random_model(MANY_CHUNKS), {str(directory)!r}, progress=progress)
"""
    search = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": search}, check=False)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("part", "kept"), [("embedding", 0), ("layers.1", 2), ("output", 3)])
def test_a_conversion_that_was_killed_is_refused_as_incomplete_and_goes_on(
    tmp_path: Path, part: str, kept: int
) -> None:
    directory = tmp_path / "model"
    interrupted(directory, part)
    with pytest.raises(CheckpointError, match=r"has no manifest.json: .* was interrupted; do that again"):
        open_model(str(directory))
    source = random_model(MANY_CHUNKS)
    assert convert(source, str(directory)).kept == kept
    assert_same_weights(open_model(str(directory)), source)
    left = sorted(path.name for path in (directory / "parameters").iterdir())
    assert left == ["embedding", "layers.0", "layers.1", "output"]


def test_parts_of_another_model_or_type_are_not_kept(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    interrupted(directory, "layers.1")
    other = Model(
        "other", type(random_model(MANY_CHUNKS).checkpoint)(MANY_CHUNKS, seed=1), random_model(MANY_CHUNKS).tokenizer
    )  # type: ignore[call-arg]
    assert convert(other, str(directory)).kept == 0
    assert_same_weights(open_model(str(directory)), other)
    again = tmp_path / "again"
    interrupted(again, "layers.1")
    assert convert(random_model(MANY_CHUNKS), str(again), "bfloat16").kept == 0


def test_a_part_that_differs_where_no_sample_is_taken_is_not_kept(tmp_path: Path) -> None:
    interrupted(tmp_path, "layers.1")
    source = random_model(MANY_CHUNKS)
    read = source.checkpoint.read

    class Tuned(type(source.checkpoint)):  # type: ignore[misc]
        """The same but for the last row of every matrix."""

        def read(self, name: str, index: Index) -> np.ndarray:
            content = read(name, index)
            (spec,) = [array for array in source.checkpoint.spec.parameters if array.name == name]
            if len(index) > 1 and index[0][1] == spec.shape[0] > index[0][0]:
                content = content.copy()
                content[-1] += 1
            return content

    tuned = Model("tuned", Tuned(MANY_CHUNKS), source.tokenizer)
    assert convert(tuned, str(tmp_path)).kept == 0
    assert_same_weights(open_model(str(tmp_path)), tuned)


def test_a_kept_part_that_was_damaged_meanwhile_is_noticed(tmp_path: Path) -> None:
    interrupted(tmp_path, "layers.1")
    file = max((tmp_path / "parameters" / "layers.0").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"layers.0: [\w.]+ cannot be read"):
        convert(random_model(MANY_CHUNKS), str(tmp_path))
    with pytest.raises(CheckpointError, match="interrupted"):
        OrbaxCheckpoint(tmp_path)


PEAK = """
import re, sys
import numpy as np
from pathlib import Path
from checkpoint_cases import words
from spotjax.checkpoint.convert import convert
from spotjax.models.catalog import Model
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec

class Generated:
    def __init__(self, config):
        self.spec = ModelSpec(config)
    def read(self, name, index):
        return np.full([stop - start for start, stop in index], len(name), np.float32)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tiny = DecoderConfig(128, 32, 1, 2, 2, 16, 64)
convert(Model("tiny", Generated(tiny), words(128)), sys.argv[1] + "/tiny")
before = peak()
large = DecoderConfig(32000, 1024, 4, 8, 8, 128, 4096)
layer = sum(array.size * 4 for array in ModelSpec(large).parameters if array.layer == 0)
done = convert(Model("large", Generated(large), words(128)), sys.argv[1] + "/large")
print(layer, done.bytes, peak() - before)
"""


def test_converting_takes_about_one_layer_of_memory(tmp_path: Path) -> None:
    search = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    # One arena: what counts is what is in use, not what glibc keeps for each of tensorstore's threads.
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": search, "MALLOC_ARENA_MAX": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    layer, total, growth = map(int, done.stdout.split())
    assert total > 7 * layer
    assert 0 < growth < 1.2 * layer


def test_the_command_converts_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the command sets, to be put back
    target = str(tmp_path / "model")
    assert cli.main(["convert", "tiny", target, "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"tiny is at {target}: 6 parts, 3.75 MiB\n" and "output" in shown.err
    assert cli.main(["convert", "tiny", target]) == 1
    assert "is a complete checkpoint already" in capsys.readouterr().err
    assert cli.main(["convert", "tiny", target + "2", "--json", "--no-verify"]) == 0
    assert '"parts":6,"kept":0,"bytes":7871232' in capsys.readouterr().out
