"""Saving parameters from devices and restoring them on other meshes: the same logits, and no needless bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts
from checkpoint_cases import MANY_CHUNKS, rounded, save, verify, words
from serving_cases import (
    BUCKETS,
    EXPERTS,
    NEOX,
    OPT,
    POST_NORM,
    SHARED_HEADS,
    RandomCheckpoint,
    build_stage,
    random_weights,
    shard,
)

from spotjax.checkpoint.completion import complete
from spotjax.checkpoint.parameters import ParameterWriter, Source, source_of
from spotjax.errors import CheckpointError, SliceUnavailable
from spotjax.meshes.layout import shard_index, split_layers, stage_holds, tensor_degrees
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.sharding import assemble, stage_mesh
from spotjax.meshes.slices import ArraySlice, whole
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.reshard.shards import Shard

FLOAT32 = np.dtype(np.float32)
UNEVEN = DecoderConfig(vocab=8191, width=384, layers=2, heads=12, kv_heads=4, head_size=32, mlp=1366)
"""41 MB whose vocabulary and feed-forward width split evenly nowhere, kv heads shared irregularly by 3 and 6 shards."""
UNEVEN_EXPERTS = replace(UNEVEN, vocab=100, mlp=390, experts=Experts(6, 2, shared_mlp=500))
"""27 MB: 6 shards deal out experts, others split each."""
WORDS = words(SHARED_HEADS.vocab).files()


def on_mesh(weights: RandomCheckpoint, shape: MeshShape, stage: int) -> dict[str, jax.Array]:
    """The arrays of a stage, sharded over its devices."""
    devices = jax.devices()[stage * shape.tensor : (stage + 1) * shape.tensor]
    ranges, mesh = split_layers(weights.spec.config.layers, shape.stage), stage_mesh(devices)
    return {
        array.name: assemble(
            array,
            weights.spec,
            mesh,
            [jax.device_put(shard(weights, array, shape.tensor, m), device) for m, device in enumerate(devices)],
        )
        for array in weights.spec.parameters
        if stage_holds(array, weights.spec, ranges, stage)
    }


def shards_of(stacked: jax.Array, array: ArraySpec, spec: ModelSpec) -> list[Shard]:
    """The shards of a stage's array (``meshes.sharding.assemble``), each under the index that it holds."""
    tensor = stacked.sharding.num_devices
    devices = list(stacked.sharding.mesh.devices.flat)
    by_device = {shard.device: shard.data for shard in stacked.addressable_shards}
    return [
        Shard(shard_index(array, spec, tensor, m), by_device[device])
        for m, device in enumerate(devices)
        if device in by_device
    ]


def sources_of(arrays: Mapping[str, jax.Array], spec: ModelSpec) -> dict[str, Source]:
    by_name = {array.name: array for array in spec.parameters}
    return {name: source_of(shards_of(stacked, by_name[name], spec)) for name, stacked in arrays.items()}


def save_from_mesh(weights: RandomCheckpoint, shape: MeshShape, directory: Path) -> OrbaxCheckpoint:
    """Every stage's process writes its parts, with a writer of its own; somebody else completes the checkpoint."""
    config = weights.spec.config
    for stage in reversed(range(shape.stage)):
        sources = sources_of(on_mesh(weights, shape, stage), weights.spec)
        writer = ParameterWriter(str(directory), config, "float32")
        for part, arrays in writer.parts.items():
            if all(array.name in sources for array in arrays.values()):
                writer.write(part, {array.name: sources[array.name] for array in arrays.values()})
        writer.close()
    complete(str(directory), config, "float32", words(config.vocab).files())
    return OrbaxCheckpoint(directory)


def logits(weights: RandomCheckpoint | OrbaxCheckpoint, shape: MeshShape) -> np.ndarray:
    """Logits (D, V) of one prompt on every replica of a mesh."""
    model, _ = random_weights(weights.spec.config)
    prompt = np.random.default_rng(7).integers(0, weights.spec.config.vocab, 13)
    rows = np.zeros((1, 2 + 16), np.int32)
    rows[0, : 2 + len(prompt)] = (0, len(prompt), *prompt)
    pages = np.zeros((1, BUCKETS.max_pages), np.int32)
    pages[0, :2] = (4, 2)
    devices, found = iter(jax.devices()), []
    for _ in range(shape.data):
        hidden: Any = None
        for number in range(shape.stage):
            group = [next(devices) for _ in range(shape.tensor)]
            stage = build_stage(model, weights, group, shape.stage, number)  # type: ignore[arg-type]
            hidden = stage.run(BUCKETS.shape(1, 16, 2), rows, pages, hidden)
        found.append(np.asarray(hidden)[0])
    return np.array(found)


@pytest.fixture(scope="module")
def from_mesh(tmp_path_factory: pytest.TempPathFactory) -> OrbaxCheckpoint:
    """Saved by two stages of two devices."""
    return save_from_mesh(RandomCheckpoint(SHARED_HEADS), MeshShape(1, 2, 2), tmp_path_factory.mktemp("saved") / "m")


@pytest.mark.parametrize("mesh", [MeshShape(2, 1, 1), MeshShape(1, 3, 1), MeshShape(1, 1, 3)], ids=str)
def test_restored_on_another_mesh_the_model_has_the_same_logits_bit_for_bit(
    from_mesh: OrbaxCheckpoint, mesh: MeshShape
) -> None:
    found, expected = logits(from_mesh, mesh), logits(RandomCheckpoint(SHARED_HEADS), mesh)
    assert found.shape == (mesh.data, SHARED_HEADS.vocab)
    assert np.ptp(expected) > 1 and not np.isnan(expected).any()
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("config", [OPT, POST_NORM, NEOX, EXPERTS], ids=["opt", "post-norm", "neox", "experts"])
def test_other_architectures_come_back_bit_for_bit_on_another_mesh(tmp_path: Path, config: DecoderConfig) -> None:
    weights, mesh = random_weights(config)[1], MeshShape(1, 2, 3)
    saved = save_from_mesh(weights, MeshShape(1, 2, 2), tmp_path / "saved")
    assert fingerprint(saved, FLOAT32) == fingerprint(weights, FLOAT32)  # type: ignore[arg-type]
    expected = logits(weights, mesh)
    assert np.ptp(expected) > 1 and not np.isnan(expected).any()
    assert logits(saved, mesh).tobytes() == expected.tobytes()


@pytest.mark.parametrize("tensor", [1, 3, 4, 6])
def test_what_any_devices_hold_is_saved_as_the_whole_arrays(tmp_path: Path, tensor: int) -> None:
    weights = RandomCheckpoint(MANY_CHUNKS)  # padded, and kv heads held twice
    saved = save_from_mesh(weights, MeshShape(1, 1, tensor), tmp_path / "saved")
    for array in weights.spec.parameters:
        np.testing.assert_array_equal(saved.read(array.name, whole(array.shape)), weights.whole(array.name))
    assert fingerprint(saved, FLOAT32) == fingerprint(weights, FLOAT32)  # type: ignore[arg-type]
    verify(saved)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrbaxCheckpoint]:
    weights, directory = RandomCheckpoint(UNEVEN), tmp_path_factory.mktemp("uneven")
    return {dtype: save(weights, directory / dtype, dtype) for dtype in ("float32", "bfloat16")}


def bytes_read() -> int:
    """By this process from files through tensorstore."""
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(metric["values"][0]["value"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensor", tensor_degrees(ModelSpec(UNEVEN), 12))
def test_a_device_reads_at_most_a_tenth_more_than_its_slices(
    uneven: dict[str, OrbaxCheckpoint], dtype: str, tensor: int
) -> None:
    saved = OrbaxCheckpoint(uneven[dtype].location)
    for m in range(tensor):
        slices = [ArraySlice(array.name, shard_index(array, saved.spec, tensor, m)) for array in saved.spec.parameters]
        before = bytes_read()
        for piece in slices:
            saved.read(*piece)
        needed = sum(piece.size for piece in slices) * np.dtype(dtype).itemsize
        assert needed <= bytes_read() - before <= 1.1 * needed


def test_of_experts_a_device_reads_at_most_a_tenth_more_than_its_slices(tmp_path: Path) -> None:
    saved = save(RandomCheckpoint(UNEVEN_EXPERTS), tmp_path / "saved", "float32")
    for tensor in tensor_degrees(saved.spec, 12):
        for m in (0, tensor - 1):
            arrays = [array for array in saved.spec.parameters if array.layer == 1]
            slices = [ArraySlice(array.name, shard_index(array, saved.spec, tensor, m)) for array in arrays]
            before = bytes_read()
            for piece in slices:
                saved.read(*piece)
            needed = 4 * sum(piece.size for piece in slices)
            assert needed <= bytes_read() - before <= 1.1 * needed, tensor
    verify(saved)


def test_opening_reads_no_parameters(uneven: dict[str, OrbaxCheckpoint]) -> None:
    before = bytes_read()
    fingerprint(OrbaxCheckpoint(uneven["float32"].location), FLOAT32)
    assert bytes_read() - before < 100_000


def test_orbax_alone_reads_every_part(from_mesh: OrbaxCheckpoint) -> None:
    import orbax.checkpoint as ocp

    weights = RandomCheckpoint(SHARED_HEADS)
    with ocp.PyTreeCheckpointer() as plain:
        tree = plain.restore(Path(from_mesh.location) / "parameters" / "layers.2")
    assert set(tree) == set(weights.spec.layer_arrays)
    for name, content in tree.items():
        np.testing.assert_array_equal(content, weights.whole(f"layers.2.{name}"))


def partly_written(directory: Path, parts: int) -> ParameterWriter:
    weights = RandomCheckpoint(SHARED_HEADS)
    writer = ParameterWriter(str(directory), SHARED_HEADS, "float32")
    for part, arrays in list(writer.parts.items())[:parts]:
        writer.write(part, {array.name: partial(weights.read, array.name) for array in arrays.values()})
    return writer


def test_a_checkpoint_of_which_parts_are_missing_is_not_completed(tmp_path: Path) -> None:
    partly_written(tmp_path, 3).close()
    with pytest.raises(CheckpointError, match=r"is incomplete: layers.2, output of 5 parts are missing"):
        complete(str(tmp_path), SHARED_HEADS, "float32", WORDS)
    assert not (tmp_path / "manifest.json").exists()


def test_a_part_that_is_written_again_counts_only_once_it_is_whole(tmp_path: Path) -> None:
    writer = partly_written(tmp_path, 5)

    def fail(_: object) -> np.ndarray:
        raise SliceUnavailable("gone")

    with pytest.raises(SliceUnavailable, match="gone"):
        writer.write("layers.0", {array.name: fail for array in writer.parts["layers.0"].values()})
    writer.close()
    with pytest.raises(CheckpointError, match=r"incomplete: layers.0 of 5 parts"):
        complete(str(tmp_path), SHARED_HEADS, "float32", WORDS)


def test_parts_of_another_type_or_model_are_not_completed(tmp_path: Path) -> None:
    partly_written(tmp_path, 5).close()
    with pytest.raises(CheckpointError, match=r"arrays of embedding are not those .* in bfloat16"):
        complete(str(tmp_path), SHARED_HEADS, "bfloat16", WORDS)
    with pytest.raises(CheckpointError, match=r"arrays of embedding are not those"):
        complete(str(tmp_path), DecoderConfig(61, 24, 3, 12, 4, 4, 50), "float32", WORDS)


def test_nothing_is_written_into_a_complete_checkpoint(from_mesh: OrbaxCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="is a complete checkpoint already; name another directory or remove it"):
        ParameterWriter(from_mesh.location, SHARED_HEADS, "float32")


def test_completing_leaves_nothing_that_was_only_needed_for_it(tmp_path: Path) -> None:
    partly_written(tmp_path, 5).close()
    complete(str(tmp_path), SHARED_HEADS, "float32", WORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "parameters", "tokenizer"]
    left = sorted(path.name for path in (tmp_path / "parameters").iterdir())
    assert left == ["embedding", "layers.0", "layers.1", "layers.2", "output"]


HALF = """
import sys
from functools import partial
from serving_cases import SHARED_HEADS, RandomCheckpoint
from spotjax.checkpoint.parameters import ParameterWriter

weights = RandomCheckpoint(SHARED_HEADS)
writer = ParameterWriter(sys.argv[1], SHARED_HEADS, "float32")
print("ready", flush=True)
sys.stdin.readline()
for part, arrays in list(writer.parts.items())[int(sys.argv[2]) :: 2]:
    writer.write(part, {array.name: partial(weights.read, array.name) for array in arrays.values()})
"""


def test_processes_write_parts_of_one_checkpoint_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", HALF, str(tmp_path / "saved")]
    writers = [
        subprocess.Popen(
            [*command, str(number)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    complete(str(tmp_path / "saved"), SHARED_HEADS, "float32", WORDS)
    verify(OrbaxCheckpoint(tmp_path / "saved"))


def test_shards_that_are_not_all_of_an_array_are_not_saved(tmp_path: Path) -> None:
    half = Shard(((0, 4), (0, 3)), jax.device_put(np.zeros((4, 3), np.float32)))
    read = source_of([half])
    assert read(((1, 3), (0, 2))).shape == (2, 2)
    with pytest.raises(SliceUnavailable, match=r"do not hold all of \[\(0, 5\), \(0, 3\)\]"):
        read(((0, 5), (0, 3)))


def test_parameters_are_stored_as_what_they_are_served_as_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="as float32 or bfloat16, not as float16"):
        ParameterWriter(str(tmp_path), SHARED_HEADS, "float16")


def test_bfloat16_rounds_to_nearest(uneven: dict[str, OrbaxCheckpoint]) -> None:
    weights = RandomCheckpoint(UNEVEN)
    found = uneven["bfloat16"].read("layers.1.mlp.down", ((3, 400), (0, 384)))
    np.testing.assert_array_equal(found, rounded(weights.whole("layers.1.mlp.down")[3:400], "bfloat16"))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file: embedding cannot be written: "):
        partly_written(tmp_path / "file", 1)
