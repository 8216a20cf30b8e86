"""Hugging Face directories: configuration, tensors, slices. The golden checkpoints are the input."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_tensors import published
from safetensors.numpy import load_file, save_file

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index, whole
from spotjax.models.huggingface import HuggingFaceCheckpoint

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 4096,
}


def stored_tensors(case: str) -> dict[str, np.ndarray]:
    """All tensors of a golden checkpoint, under their published names, in float32."""
    tensors = {}
    for path in (GOLDEN / case).glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_array_is_the_published_tensor_in_our_layout(case: str) -> None:
    checkpoint, tensors = HuggingFaceCheckpoint(GOLDEN / case), stored_tensors(case)
    for array in checkpoint.spec.parameters:
        read = checkpoint.read(array.name, whole(array.shape))
        assert read.dtype == np.float32 and read.flags.c_contiguous and read.shape == array.shape
        np.testing.assert_array_equal(read, published(array, checkpoint.spec.config, tensors), err_msg=array.name)
    checkpoint.close()


@pytest.fixture(scope="module", params=["llama-gqa-linear-bias", "qwen3", "opt", "gpt-neox", "gpt2"])
def checkpoint(request: pytest.FixtureRequest) -> HuggingFaceCheckpoint:
    return HuggingFaceCheckpoint(GOLDEN / request.param)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_slice_is_that_part_of_the_whole_array(checkpoint: HuggingFaceCheckpoint, data: st.DataObject) -> None:
    array = data.draw(st.sampled_from(checkpoint.spec.parameters))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, extent)] * 2))) for extent in array.shape]
    index: Index = tuple((start, stop) for start, stop in bounds)
    part = checkpoint.read(array.name, index)
    assert part.flags.c_contiguous
    np.testing.assert_array_equal(
        part, checkpoint.read(array.name, whole(array.shape))[tuple(slice(*pair) for pair in index)]
    )


def test_reading_a_slice_takes_memory_for_the_slice_only(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (20_000, 12), "lm_head.weight": (20_000, 12)}
    write_checkpoint(tmp_path, CONFIG | {"vocab_size": 20_000}, shapes)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    tracemalloc.start()
    try:
        for index in (((0, 12), (5_000, 5_100)), ((3, 4), (0, 100))):
            checkpoint.read("head", index)
        assert tracemalloc.get_traced_memory()[1] < 40_000  # bytes; the array has 960,000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("index", [((0, 51), (0, 12)), ((-1, 5), (0, 12)), ((5, 4), (0, 12)), ((0, 50),)])
def test_an_index_outside_the_array_is_an_error(tmp_path: Path, index: Index) -> None:
    write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"outside embedding of shape \(50, 12\)"):
        HuggingFaceCheckpoint(tmp_path).read("embedding", index)


def test_an_array_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="'head'"):
        HuggingFaceCheckpoint(GOLDEN / "qwen2").read("head", ((0, 1), (0, 1)))


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    dtype: Any = np.float32,
) -> None:
    """A checkpoint of zeros of the default shapes; ``shapes`` adds tensors, changes shapes or (None) drops some."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (12, 12),
        "self_attn.k_proj.weight": (12, 12),
        "self_attn.v_proj.weight": (12, 12),
        "self_attn.o_proj.weight": (12, 12),
        "mlp.gate_proj.weight": (20, 12),
        "mlp.up_proj.weight": (20, 12),
        "mlp.down_proj.weight": (12, 20),
        "input_layernorm.weight": (12,),
        "post_attention_layernorm.weight": (12,),
    }
    all_shapes: dict[str, tuple[int, ...] | None] = {
        f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()
    }
    all_shapes |= {"model.embed_tokens.weight": (50, 12), "model.norm.weight": (12,), "lm_head.weight": (50, 12)}
    all_shapes |= shapes or {}
    tensors = {name: np.zeros(shape, dtype) for name, shape in all_shapes.items() if shape is not None}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, CONFIG, {name: None})
    with pytest.raises(CheckpointError, match=f"tensor {name} .* is missing"):
        HuggingFaceCheckpoint(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, {"model.layers.0.self_attn.k_proj.weight": (8, 12)})
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.k_proj.weight has shape \(8, 12\).*\(12, 12\)"):
        HuggingFaceCheckpoint(tmp_path)


def test_a_tensor_that_the_model_would_not_use_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, {"model.layers.0.self_attn.q_proj.bias": (12,)})
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.0.self_attn.q_proj.bias"):
        HuggingFaceCheckpoint(tmp_path)


def test_rotary_tables_and_the_head_of_a_tied_model_are_not_needed(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, CONFIG | {"tie_word_embeddings": True}, {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    )
    assert "head" not in {array.name for array in HuggingFaceCheckpoint(tmp_path).spec.parameters}


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, dtype=ml_dtypes.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is F8_E4M3"):
        HuggingFaceCheckpoint(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: Any) -> None:
    write_checkpoint(tmp_path, CONFIG, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = np.linspace(-3, 3, 12).astype(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    read = HuggingFaceCheckpoint(tmp_path).read("norm.scale", ((2, 9),))
    np.testing.assert_array_equal(read, np.linspace(-3, 3, 12).astype(dtype).astype(np.float32)[2:9])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3")
    lost = sorted((tmp_path / "qwen3").glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        HuggingFaceCheckpoint(tmp_path / "qwen3")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 3}}', "[]"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        HuggingFaceCheckpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 4000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    write_checkpoint(tmp_path, CONFIG)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        HuggingFaceCheckpoint(tmp_path)


def test_weights_in_other_formats_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        HuggingFaceCheckpoint(tmp_path)
