"""Reading saved checkpoints: any slice bit for bit, nothing that is damaged, and without jax."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from checkpoint_cases import MANY_CHUNKS, rounded, save, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import RandomCheckpoint, checkpoint

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import ArraySlice, Index, whole
from spotjax.models.catalog import open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.orbax_manifest import decode, encode
from spotjax.models.spec import ArraySpec

WEIGHTS = RandomCheckpoint(MANY_CHUNKS)
DTYPES = ("float32", "bfloat16")
SERVED = [np.dtype(dtype) for dtype in DTYPES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrbaxCheckpoint]:
    """The same weights as both types."""
    return {dtype: save(WEIGHTS, tmp_path_factory.mktemp("saved") / "a model", dtype) for dtype in DTYPES}


@pytest.fixture
def copy(saved: dict[str, OrbaxCheckpoint], tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(saved["float32"].location, tmp_path / "copy"))


@st.composite
def slices(draw: st.DrawFn) -> tuple[ArraySpec, Index]:
    array = draw(st.sampled_from(WEIGHTS.spec.parameters))
    ends = [sorted(draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))) for extent in array.shape]
    return array, tuple((start, stop) for start, stop in ends)


@settings(max_examples=150)
@given(wanted=slices(), dtype=st.sampled_from(DTYPES))
def test_any_slice_is_read_bit_for_bit(saved: dict[str, OrbaxCheckpoint], wanted: tuple, dtype: str) -> None:
    array, index = wanted
    found = saved[dtype].read(array.name, index)
    np.testing.assert_array_equal(found, rounded(WEIGHTS.read(array.name, index), dtype))
    assert found.dtype == np.float32 and found.flags.c_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_slices_are_read_at_once_into_arrays_of_any_strides_and_type(
    saved: dict[str, OrbaxCheckpoint], dtype: str
) -> None:
    wanted = [ArraySlice(array.name, whole(array.shape)) for array in WEIGHTS.spec.parameters]
    targets = [np.zeros([extent + 3 for extent in piece.shape], dtype) for piece in wanted]
    inside = [target[tuple(slice(1, 1 + extent) for extent in p.shape)] for target, p in zip(targets, wanted)]  # noqa: B905
    saved["float32"].read_into(zip(wanted, inside, strict=True))
    for piece, part, target in zip(wanted, inside, targets, strict=True):
        np.testing.assert_array_equal(part, WEIGHTS.read(*piece).astype(dtype))
        assert np.count_nonzero(target) == np.count_nonzero(part)


def test_what_the_model_has_not_is_refused(saved: dict[str, OrbaxCheckpoint]) -> None:
    with pytest.raises(CheckpointError, match=r"no array 'layers.2.mlp.gate'"):
        saved["float32"].read("layers.2.mlp.gate", ((0, 1), (0, 1)))
    with pytest.raises(ValueError, match=r"reaches outside norm.scale of shape \(96,\)"):
        saved["float32"].read("norm.scale", ((0, 97),))
    with pytest.raises(ValueError, match="reaches outside"):
        saved["float32"].read("norm.scale", ((0, 1), (0, 1)))


def test_the_fingerprint_is_that_of_what_is_served_and_reads_nothing(
    saved: dict[str, OrbaxCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {dtype.name: fingerprint(WEIGHTS, dtype) for dtype in SERVED}  # type: ignore[arg-type]
    assert len(set(expected.values())) == 2
    monkeypatch.setattr(OrbaxCheckpoint, "read_into", None)
    assert {dtype.name: fingerprint(saved["float32"], dtype) for dtype in SERVED} == expected
    rounded_off = {dtype.name: fingerprint(saved["bfloat16"], dtype) for dtype in SERVED}
    assert rounded_off["bfloat16"] == expected["bfloat16"]
    assert rounded_off["float32"] != expected["float32"]


@pytest.mark.parametrize("case", ["llama-gqa-llama3", "llama-gqa-yarn", "llama-gqa-linear-bias", "mistral", "qwen3"])
def test_every_configuration_has_the_fingerprint_of_its_origin(tmp_path: Path, case: str) -> None:
    ours = save(checkpoint(case), tmp_path / "saved")
    assert ours.spec == checkpoint(case).spec
    assert fingerprint(ours, SERVED[0]) == fingerprint(checkpoint(case), SERVED[0])


def test_a_url_that_tensorstore_knows_is_a_location(saved: dict[str, OrbaxCheckpoint], tmp_path: Path) -> None:
    path = shutil.copytree(saved["bfloat16"].location, tmp_path / "copy")
    found = OrbaxCheckpoint(f"file://{path}").read("embedding", ((5, 7), (0, 96)))
    np.testing.assert_array_equal(found, rounded(WEIGHTS.read("embedding", ((5, 7), (0, 96))), "bfloat16"))
    with pytest.raises(CheckpointError, match="nowhere:// is not a URL that can be opened"):
        OrbaxCheckpoint("nowhere://")


def test_reading_opening_and_completing_import_neither_jax_nor_orbax(copy: Path) -> None:
    program = (
        "import sys; import spotjax.checkpoint.completion; from spotjax.models.catalog import open_model\n"
        f"model = open_model({str(copy)!r}); model.checkpoint.read('norm.scale', ((0, 5),))\n"
        "sys.exit('jax' in sys.modules or 'orbax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_directory_without_a_manifest_is_incomplete(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest.json: .* was interrupted; do that again"):
        open_model(str(copy))


def test_of_files_that_went_missing_the_first_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "parameters" / "layers.1")
    with pytest.raises(CheckpointError, match=r"layers.1: manifest.ocdbt cannot be read: it is missing; restore"):
        OrbaxCheckpoint(copy)


def test_a_part_of_another_checkpoint_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "parameters" / "layers.1")
    shutil.copytree(copy / "parameters" / "layers.0", copy / "parameters" / "layers.1")
    with pytest.raises(CheckpointError, match=r"layers.1: manifest.ocdbt .* is damaged or another checkpoint's"):
        OrbaxCheckpoint(copy)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])


@DAMAGES
def test_damaged_parameters_are_noticed_by_whoever_reads_them(copy: Path, damage: Callable[[Path], None]) -> None:
    files = (copy / "parameters" / "layers.1").rglob("ocdbt.process_0/d/*")
    damage(max(files, key=lambda path: path.stat().st_size))
    broken = OrbaxCheckpoint(copy)
    with pytest.raises(CheckpointError, match=r"copy: layers.1: [\w.]+ cannot be read: .*; restore the directory"):
        for array in broken.spec.parameters:
            broken.read(array.name, whole(array.shape))
    np.testing.assert_array_equal(
        broken.read("layers.0.mlp.up", ((0, 96), (0, 366))), WEIGHTS.whole("layers.0.mlp.up"), err_msg="is intact"
    )
    with pytest.raises(CheckpointError, match=r"layers.1: "):
        verify(broken)


@DAMAGES
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "parameters/layers.0/manifest.ocdbt"])
def test_other_damage_is_noticed_when_the_model_is_opened(
    copy: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / name)
    with pytest.raises(CheckpointError, match=Path(name).name):
        open_model(str(copy))


def test_parameters_that_are_valid_but_not_those_that_were_saved_fail_verification(copy: Path) -> None:
    manifest = decode((copy / "manifest.json").read_bytes(), "here")
    arrays = manifest.parts["layers.1"].arrays
    arrays["mlp.gate"] = msgspec.structs.replace(arrays["mlp.gate"], checksum="0" * 16)
    (copy / "manifest.json").write_bytes(encode(manifest))
    with pytest.raises(CheckpointError, match=r"layers.1: mlp.gate cannot be read: its checksum is wrong; restore"):
        verify(OrbaxCheckpoint(copy))


def test_arrays_of_another_shape_than_the_configuration_says_are_refused(copy: Path) -> None:
    manifest = decode((copy / "manifest.json").read_bytes(), "here")
    config = msgspec.structs.replace(
        manifest, config=msgspec.convert({**as_dict(manifest.config), "mlp": 367}, type(MANY_CHUNKS))
    )
    (copy / "manifest.json").write_bytes(encode(config))
    with pytest.raises(CheckpointError, match=r"the arrays of layers.0 are not those that the configuration describes"):
        OrbaxCheckpoint(copy)


def test_arrays_of_another_shape_than_the_manifest_says_are_refused(copy: Path, tmp_path: Path) -> None:
    other = save(
        RandomCheckpoint(msgspec.convert({**as_dict(MANY_CHUNKS), "mlp": 368}, type(MANY_CHUNKS))), tmp_path / "o"
    )
    manifest = decode((copy / "manifest.json").read_bytes(), "here")
    part = msgspec.structs.replace(manifest.parts["layers.0"], checksum=other.manifest.parts["layers.0"].checksum)
    (copy / "manifest.json").write_bytes(
        encode(msgspec.structs.replace(manifest, parts={**manifest.parts, "layers.0": part}))
    )
    shutil.rmtree(copy / "parameters" / "layers.0")
    shutil.copytree(tmp_path / "o" / "parameters" / "layers.0", copy / "parameters" / "layers.0")
    with pytest.raises(
        CheckpointError, match=r"mlp.up cannot be read: it is float32\[96, 368\] instead of float32\[96, 366\]"
    ):
        OrbaxCheckpoint(copy).read("layers.0.mlp.up", ((0, 1), (0, 1)))


def test_another_format_is_refused_by_number(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2'))
    with pytest.raises(CheckpointError, match="has format 2, this version of Spotjax reads 1"):
        OrbaxCheckpoint(copy)


def as_dict(config: object) -> dict[str, object]:
    built: dict[str, object] = msgspec.to_builtins(config)
    return built
