"""int8 matrices: the error of every weight, scales that no mesh changes, checkpoints of all kinds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from checkpoint_cases import MANY_CHUNKS, random_model, save, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from serving_cases import EXPERTS, NEOX, POST_NORM, SHARED_HEADS, RandomCheckpoint, checkpoint

from spotjax.errors import CheckpointError, ConfigError
from spotjax.meshes.layout import shard_index
from spotjax.meshes.slices import ArraySlice, Index, whole
from spotjax.models import quantized_checkpoint
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.config import DecoderConfig
from spotjax.models.fingerprint import fingerprint
from spotjax.models.quantization import INPUT_AXES, quantize, scales_from
from spotjax.models.quantized_checkpoint import QuantizedCheckpoint, quantized
from spotjax.models.spec import ArraySpec

FLOAT32 = np.dtype(np.float32)
SMALL = replace(SHARED_HEADS, layers=1)
MOE = replace(EXPERTS, layers=1)


class Counting(RandomCheckpoint):
    """Counts the elements that are read."""

    elements = 0

    def read(self, name: str, index: Index) -> np.ndarray:
        self.elements += ArraySlice(name, index).size
        return super().read(name, index)


@cache
def weights(config: DecoderConfig) -> tuple[RandomCheckpoint, dict[str, np.ndarray]]:
    """A model, and all its arrays as ``by_hand`` quantizes them."""
    random = RandomCheckpoint(config)
    expected = {}
    for array in random.spec.parameters:
        content = random.whole(array.name)
        if array.axes in INPUT_AXES:
            expected[array.name], expected[f"{array.name}_scale"] = by_hand(content, INPUT_AXES[array.axes])
        else:
            expected[array.name] = content
    return random, expected


def by_hand(matrix: np.ndarray, inputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int8 and scales, weight by weight, in double precision."""
    outputs = [axis for axis in range(matrix.ndim) if axis not in inputs]
    scales = np.zeros([matrix.shape[axis] for axis in outputs])
    levels = np.zeros(matrix.shape, np.int8)
    for channel in product(*(range(matrix.shape[axis]) for axis in outputs)):
        at = [slice(None)] * matrix.ndim
        for axis, number in zip(outputs, channel, strict=True):
            at[axis] = slice(number, number + 1)
        column = matrix[tuple(at)].astype(np.float64)
        scales[channel] = max(abs(float(weight)) for weight in column.flat) / 127
        rounded = [round(float(weight) / scales[channel]) for weight in column.flat]
        levels[tuple(at)] = np.reshape(rounded, column.shape)
    return levels, scales


@given(arrays.arrays(np.float32, (7, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_no_weight_is_further_off_than_half_a_scale(matrix: np.ndarray) -> None:
    scales = scales_from(np.abs(matrix).max(0))
    levels = quantize(matrix, scales)
    assert levels.dtype == np.int8 and np.abs(levels.astype(int)).max() <= 127
    error = np.abs(matrix.astype(np.float64) - levels * scales.astype(np.float64))
    assert (error <= 0.5 * scales * (1 + 1e-5)).all()
    assert (scales > 0).all() and np.isfinite(scales).all()


@given(arrays.arrays(np.int8, (6, 4), elements=st.integers(-127, 127)), st.floats(2.0**-10, 2.0**10, width=32))
def test_what_was_quantized_stays_as_it_is(levels: np.ndarray, scale: float) -> None:
    levels[0] = 127
    again = scales_from(np.abs(levels * np.float32(scale)).max(0))
    np.testing.assert_array_equal(quantize(levels * np.float32(scale), again), levels)


@pytest.mark.parametrize("config", [SMALL, replace(POST_NORM, layers=1), replace(NEOX, layers=1), MOE])
def test_every_array_is_what_brute_force_makes_of_it(config: DecoderConfig) -> None:
    random, expected = weights(config)
    found = QuantizedCheckpoint(random)  # type: ignore[arg-type]
    assert [array.name for array in found.spec.parameters] == list(expected)
    for array in found.spec.parameters:
        content = found.read(array.name, whole(array.shape))
        assert content.shape == expected[array.name].shape == array.shape
        assert content.dtype == (np.int8 if expected[array.name].dtype == np.int8 else np.float32)
        np.testing.assert_allclose(content, expected[array.name], rtol=1e-6, err_msg=array.name)
    norms = [array.name for array in found.spec.parameters if array.name.endswith("norm.scale")]
    assert norms and all(found.spec.element_type(name) is None for name in norms)


@settings(max_examples=60)
@given(st.data())
def test_any_slice_is_that_of_the_whole_array_whatever_was_read_before(data: st.DataObject) -> None:
    random, _ = weights(SMALL)
    found, apart = QuantizedCheckpoint(random), QuantizedCheckpoint(random)  # type: ignore[arg-type]
    for _ in range(3):
        array = data.draw(st.sampled_from(apart.spec.parameters))
        index = tuple(tuple(sorted(data.draw(st.tuples(*[st.integers(0, extent)] * 2)))) for extent in array.shape)
        content = apart.read(array.name, index)
        cut = found.read(array.name, whole(array.shape))[tuple(slice(*extent) for extent in index)]
        assert content.dtype == cut.dtype
        np.testing.assert_array_equal(content, cut)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6])
def test_shards_of_any_degree_have_the_same_scales_and_most_arrays_are_read_once(tensor: int) -> None:
    source = Counting(SMALL)
    found = QuantizedCheckpoint(source)  # type: ignore[arg-type]
    _, expected = weights(SMALL)
    split_inputs = total = 0
    for array in found.spec.parameters:
        for m in range(tensor):
            index = shard_index(array, found.spec, tensor, m)
            cut = expected[array.name][tuple(slice(*extent) for extent in index)]
            np.testing.assert_allclose(found.read(array.name, index), cut, rtol=1e-6, err_msg=array.name)
            size = ArraySlice(array.name, index).size
            total += size if found.spec.element_type(array.name) != "float32" else 0
        if tensor > 1 and array.name.endswith(("attention.output", "mlp.down")):
            split_inputs += array.size
    assert source.elements == total + split_inputs, "only arrays whose inputs are split are read twice"


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_checkpoint, "BLOCK_BYTES", 512)
    largest = 0

    class Watched(Counting):
        def read(self, name: str, index: Index) -> np.ndarray:
            nonlocal largest
            if RandomCheckpoint(SMALL).spec.element_type(name) is None and len(index) > 1:
                largest = max(largest, ArraySlice(name, index).size * 4)
            return super().read(name, index)

    found, (_, expected) = QuantizedCheckpoint(Watched(SMALL)), weights(SMALL)  # type: ignore[arg-type]
    for array in found.spec.parameters:
        wanted = [ArraySlice(array.name, shard_index(array, found.spec, 2, m)) for m in range(2)]
        for piece in wanted:
            cut = expected[array.name][tuple(slice(*extent) for extent in piece.index)]
            np.testing.assert_allclose(found.read(*piece), cut, rtol=1e-6)
    assert 0 < largest <= 512


def test_weights_that_are_not_finite_are_refused() -> None:
    class Broken(RandomCheckpoint):
        def read(self, name: str, index: Index) -> np.ndarray:
            content = super().read(name, index).copy()
            content.flat[-1] = np.inf
            return content

    with pytest.raises(CheckpointError, match=r"mlp\.up has weights that are not finite"):
        QuantizedCheckpoint(Broken(SMALL)).read("layers.0.mlp.up", ((0, 24), (0, 50)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("config", "dtype"), [(MANY_CHUNKS, "float32"), (SMALL, "bfloat16"), (MOE, "float32")])
def test_a_model_is_the_same_whether_it_is_quantized_when_it_is_read_or_was_before(
    tmp_path, config: DecoderConfig, dtype: str
) -> None:
    plain = save(RandomCheckpoint(config), tmp_path / "plain", "float32")
    on_the_way = QuantizedCheckpoint(RandomCheckpoint(config))  # type: ignore[arg-type]
    stored = save(on_the_way, tmp_path / "int8", dtype)
    verify(stored)
    assert stored.spec.quantization == "int8"
    assert stored.spec.parameters == on_the_way.spec.parameters
    for array in stored.spec.parameters:
        if dtype == "float32" or stored.spec.element_type(array.name):
            index = whole(array.shape)
            np.testing.assert_array_equal(stored.read(array.name, index), on_the_way.read(array.name, index))
    served = np.dtype(stored.manifest.dtype)
    prints = [fingerprint(one, served) for one in (stored, on_the_way, QuantizedCheckpoint(plain))]
    assert len(set(prints)) == 1, prints
    assert prints[0] != fingerprint(plain, served)


def test_a_fingerprint_notices_a_scale() -> None:
    class Louder(RandomCheckpoint):
        def read(self, name: str, index: Index) -> np.ndarray:
            return super().read(name, index) * np.float32(2 if name == "layers.0.mlp.down" else 1)

    one, other = (QuantizedCheckpoint(kind(SMALL)) for kind in (RandomCheckpoint, Louder))  # type: ignore[arg-type]
    index: Index = ((0, 50), (0, 24))
    name = "layers.0.mlp.down"
    np.testing.assert_array_equal(one.read(name, index), other.read(name, index))
    assert fingerprint(one, FLOAT32) != fingerprint(other, FLOAT32)


def test_what_is_stored_as_int8_is_served_as_int8_or_not_at_all(tmp_path) -> None:
    stored = save(QuantizedCheckpoint(RandomCheckpoint(SMALL)), tmp_path)  # type: ignore[arg-type]
    assert quantized(stored, "int8") is stored
    with pytest.raises(ConfigError, match="stored as int8 and cannot be served with quantization none"):
        quantized(stored, "none")


@pytest.mark.parametrize("case", ["gpt-neox", "llama-gqa-linear-bias"])
def test_published_checkpoints_are_quantized_as_any_others(case: str) -> None:
    published: Checkpoint = checkpoint(case)
    found = QuantizedCheckpoint(published)
    for array in found.spec.parameters:
        if found.spec.element_type(array.name) == "int8":
            matrix = published.read(array.name, whole(array.shape))
            scale = found.read(f"{array.name}_scale", whole(scale_of(found, array).shape))
            wide = np.expand_dims(scale, INPUT_AXES[array.axes])
            error = np.abs(matrix - found.read(array.name, whole(array.shape)) * wide)
            assert (error <= 0.501 * wide).all(), array.name


def scale_of(found: QuantizedCheckpoint, array: ArraySpec) -> ArraySpec:
    """The scales of an array."""
    return next(one for one in found.spec.parameters if one.name == f"{array.name}_scale")


def test_a_converted_model_keeps_what_its_int8_fingerprint_is_made_of(tmp_path) -> None:
    stored = save(random_model(SMALL).checkpoint, tmp_path)
    found = QuantizedCheckpoint(stored)
    expected = fingerprint(QuantizedCheckpoint(RandomCheckpoint(SMALL)), FLOAT32)  # type: ignore[arg-type]
    stored.close()
    assert fingerprint(found, FLOAT32) == expected, "without reading anything"
