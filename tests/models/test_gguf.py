"""GGUF files: written here from the golden checkpoints with the published library, read back, and damaged."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index, whole
from spotjax.models.config import DecoderConfig, RopeScaling
from spotjax.models.gguf import LAYOUT, GgufCheckpoint
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.spec import ArraySpec

GOLDEN = Path(__file__).parents[1] / "golden"
Q8_0 = GGMLQuantizationType.Q8_0
Change = Callable[[GGUFWriter], None]


def published(array: ArraySpec, values: np.ndarray, c: DecoderConfig, interleave: bool) -> np.ndarray:
    """An array of ours as a converter writes it: (out, in), heads merged, rotary pairs interleaved for llama."""
    name = array.name.rsplit(".", 1)[-1]
    if name in ("query", "key", "value"):
        values = values.transpose(1, 2, 0).reshape(-1, c.width)
    elif name == "output":
        values = values.reshape(-1, c.width).T
    elif name in ("gate", "up", "down", "head"):
        values = values.T
    else:
        values = values.reshape(-1, c.width) if name == "embedding" else values.reshape(-1)
    if interleave and name in ("query", "key", "query_bias", "key_bias"):
        shape = values.shape  # convert_hf_to_gguf.py, LlamaModel.permute
        heads = shape[0] // c.head_size
        values = values.reshape(heads, 2, c.head_size // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(values)


def write_gguf(path: Path, case: str, change: Change = lambda _: None, skip: str = "", cut: str = "") -> None:
    """A golden checkpoint as GGUF; down projections in Q8_0, gate projections in float16.

    ``change`` adds metadata or tensors, ``skip`` drops a tensor, ``cut`` takes the last row off one.
    """
    source = HuggingFaceCheckpoint(GOLDEN / case)
    c, architecture = source.spec.config, case.split("-")[0].replace("mistral", "llama")
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.mlp)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_context_length(c.max_positions)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_rope_dimension_count(c.head_size)
    if c.windows:
        writer.add_sliding_window(c.windows[0])
    change(writer)
    for array in source.spec.parameters:
        local = array.name if array.layer is None else array.name.split(".", 2)[2]
        name = ("" if array.layer is None else LAYOUT.layer_prefix.format(array.layer)) + LAYOUT.names[local]
        values = published(array, source.read(array.name, whole(array.shape)), c, architecture == "llama")
        if name == skip:
            continue
        if name == cut:
            values = values[:-1]
        if local == "mlp.down" and values.shape[1] % 32 == 0:
            writer.add_tensor(name, quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, values.astype(np.float16) if local == "mlp.gate" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scaling_of(case: str) -> Change:
    """What adds the golden case's rotary scaling to a file, as converters write it."""
    c = HuggingFaceCheckpoint(GOLDEN / case).spec.config
    scaling = c.rope_scaling

    def add(writer: GGUFWriter) -> None:
        if scaling is None:
            return
        if scaling.kind == "llama3":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_positions)
            writer.add_tensor("rope_freqs.weight", llama3_factors(c.head_size, c.rope_base, scaling))
            return
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_positions)
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)

    return add


def llama3_factors(head_size: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """As convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    factors = []
    for pair in range(head_size // 2):
        length = 2 * math.pi * base ** (2 * pair / head_size)
        if length < scaling.original_positions / scaling.high_frequency:
            factors.append(1.0)
        elif length > scaling.original_positions / scaling.low_frequency:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_positions / length - scaling.low_frequency
            smooth /= scaling.high_frequency - scaling.low_frequency
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


UNLIKE = ("qwen2-window", "qwen2-moe", "qwen3-moe")
"""What GGUF says too little about, or is not read from it."""
FILES = {path.name for path in GOLDEN.iterdir() if path.name.startswith(("llama-", "mistral", "qwen"))}
CASES = sorted(FILES.difference(UNLIKE))


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_as_gguf_is_the_same_model(tmp_path: Path, case: str) -> None:
    write_gguf(tmp_path / "model.gguf", case, scaling_of(case))
    ours, theirs = GgufCheckpoint(tmp_path / "model.gguf"), HuggingFaceCheckpoint(GOLDEN / case)
    assert ours.spec == theirs.spec
    for array in theirs.spec.parameters:
        wanted = theirs.read(array.name, whole(array.shape))
        if array.name.endswith("mlp.down") and array.shape[0] % 32 == 0:
            wanted = dequantize(quantize(np.ascontiguousarray(wanted.T), Q8_0), Q8_0).T
        elif array.name.endswith("mlp.gate"):
            wanted = wanted.astype(np.float16).astype(np.float32)
        read = ours.read(array.name, whole(array.shape))
        assert read.dtype == np.float32 and read.flags.c_contiguous
        np.testing.assert_array_equal(read, wanted, err_msg=array.name)
    ours.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama-gqa-llama3")
    return GgufCheckpoint(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_slice_is_that_part_of_the_whole_array(checkpoint: GgufCheckpoint, data: st.DataObject) -> None:
    array = data.draw(st.sampled_from(checkpoint.spec.parameters))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, extent)] * 2))) for extent in array.shape]
    index: Index = tuple((start, stop) for start, stop in bounds)
    np.testing.assert_array_equal(
        checkpoint.read(array.name, index),
        checkpoint.read(array.name, whole(array.shape))[tuple(slice(*pair) for pair in index)],
    )


def test_reading_a_slice_takes_memory_for_the_slice_only(checkpoint: GgufCheckpoint) -> None:
    whole_bytes = 96 * 48 * 4
    checkpoint.read("layers.0.mlp.down", ((32, 64), (0, 2)))  # imports and caches of numpy
    tracemalloc.start()
    try:
        checkpoint.read("layers.0.mlp.down", ((32, 64), (0, 2)))
        assert tracemalloc.get_traced_memory()[1] < whole_bytes / 2
    finally:
        tracemalloc.stop()


def test_an_array_that_the_model_lacks_is_an_error(checkpoint: GgufCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="'head'"):
        checkpoint.read("head", ((0, 1), (0, 1)))
    with pytest.raises(ValueError, match="outside embedding"):
        checkpoint.read("embedding", ((0, 1), (0, 1000)))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_k.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "model.gguf", "mistral", skip=name)
    with pytest.raises(CheckpointError, match=f"tensor {name} .*missing"):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "mistral", cut="blk.1.attn_k.weight")
    with pytest.raises(CheckpointError, match=r"blk.1.attn_k.weight has shape \(15, 48\).*\(16, 48\)"):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_a_tensor_that_the_model_would_not_use_is_named(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "model.gguf", "mistral", lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros(4, "f4"))
    )
    with pytest.raises(CheckpointError, match=r"no tensor blk.0.ffn_gate_inp.weight"):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    name, blocks = "blk.0.ffn_down.weight", np.zeros((48, 96 // 32 * 40), np.uint8)
    q8_1 = GGMLQuantizationType.Q8_1
    write_gguf(tmp_path / "model.gguf", "mistral", lambda w: w.add_tensor(name, blocks, raw_dtype=q8_1), skip=name)
    with pytest.raises(CheckpointError, match=f"{name} is Q8_1"):
        GgufCheckpoint(tmp_path / "model.gguf")


def other_factors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 5], np.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.add_expert_count(8), "expert_count 8"),
        (lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE), "'longrope' is not supported"),
        (lambda w: w.add_rope_scaling_type(RopeScalingType.YARN), "needs rope.scaling.factor"),
        (other_factors, "another rotary scaling"),
        (lambda w: w.add_uint16("split.count", 3), "split"),
        (lambda w: w.add_string("llama.attention.head_count", "six"), "attention.head_count"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(tmp_path: Path, change: Change, named: str) -> None:
    write_gguf(tmp_path / "model.gguf", "mistral", change)
    with pytest.raises(CheckpointError, match=named):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_a_window_whose_layers_are_not_named_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2", lambda w: w.add_sliding_window(64))
    with pytest.raises(CheckpointError, match="sliding_window 64 is not supported for qwen2"):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_yarn_scales_attention_as_the_file_says(tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_attn_factors(0.5)

    write_gguf(tmp_path / "model.gguf", "mistral", change)
    scaling = GgufCheckpoint(tmp_path / "model.gguf").spec.config.rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, 256, attention_factor=0.5 * (0.1 * math.log(4) + 1))


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'falcon' is not supported, only llama, qwen2, qwen3, gemma2"):
        GgufCheckpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 5_000, 100_000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.gguf cannot be read as GGUF"):
        GgufCheckpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.gguf cannot be read"):
        GgufCheckpoint(tmp_path / "none.gguf")
