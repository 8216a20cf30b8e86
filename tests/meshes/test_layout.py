import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.meshes.layout import (
    kv_heads_per_shard,
    shard_index,
    shard_shape,
    slices_at,
    split_layers,
    stage_holds,
    tensor_axes,
    tensor_degrees,
    tensor_range,
)
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import ArraySlice
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.spec import ModelSpec


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 6))
    experts = draw(st.none() | st.integers(1, 13).map(lambda count: Experts(count, 1, shared_mlp=count // 2)))
    config = DecoderConfig(
        vocab=draw(st.integers(1, 17)),
        width=draw(st.integers(1, 8)),
        layers=draw(st.integers(1, 7)),
        heads=kv_heads * draw(st.integers(1, 6)),
        kv_heads=kv_heads,
        head_size=2,
        mlp=draw(st.integers(1, 17)),
        tied_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        positions=draw(st.sampled_from(("rotary", "learned"))),
        norm=draw(st.sampled_from(("rms", "layer"))),
        norm_place=draw(st.sampled_from(("before", "after"))),
        gated_mlp=experts is not None or draw(st.booleans()),
        mlp_bias=experts is None and draw(st.booleans()),
        experts=experts,
        embedding_width=draw(st.sampled_from((None, 3))),
        max_positions=draw(st.integers(1, 9)),
    )
    return ModelSpec(config)


@st.composite
def spec_and_tensor(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    spec = draw(specs())
    return spec, draw(st.sampled_from(tensor_degrees(spec, spec.config.heads)))


@given(st.integers(1, 100), st.integers(1, 100))
def test_layers_split_evenly_in_order_longer_stages_first(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(ValueError, match="cannot fill"):
            split_layers(layers, stages)
        return
    ranges = split_layers(layers, stages)
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(layers))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1 and len(sizes) == stages


@given(spec_and_tensor())
def test_shards_of_one_array_cover_it_and_only_kv_heads_overlap(case: tuple[ModelSpec, int]) -> None:
    spec, tensor = case
    for array in (*spec.parameters, spec.kv_array(0, 2, 3)):
        counts = np.zeros(array.shape, dtype=int)
        for m in range(tensor):
            counts[tuple(slice(*r) for r in shard_index(array, spec, tensor, m))] += 1
        assert counts.min() >= 1
        if "kv_heads" not in array.axes and tensor_axes(spec, tensor) & set(array.axes):
            assert counts.max() == 1


@given(spec_and_tensor())
def test_a_shard_has_the_kv_heads_of_its_query_heads(case: tuple[ModelSpec, int]) -> None:
    spec, tensor = case
    heads, kv_heads = spec.config.heads, spec.config.kv_heads
    for m in range(tensor):
        q0, q1 = tensor_range(heads, "heads", spec, tensor, m)
        k0, k1 = tensor_range(kv_heads, "kv_heads", spec, tensor, m)
        assert {query * kv_heads // heads for query in range(q0, q1)} <= set(range(k0, k1))
        assert k0 >= 0 and k1 <= kv_heads and k1 - k0 == kv_heads_per_shard(heads, kv_heads, tensor)


@given(spec_and_tensor())
def test_kv_heads_are_not_replicated_where_tensor_divides_them(case: tuple[ModelSpec, int]) -> None:
    spec, tensor = case
    if spec.config.kv_heads % tensor == 0:
        assert kv_heads_per_shard(spec.config.heads, spec.config.kv_heads, tensor) == spec.config.kv_heads // tensor
    elif tensor % spec.config.kv_heads == 0:
        assert kv_heads_per_shard(spec.config.heads, spec.config.kv_heads, tensor) == 1


@given(spec_and_tensor())
def test_no_shard_is_larger_than_its_padded_shape(case: tuple[ModelSpec, int]) -> None:
    spec, tensor = case
    for array in spec.parameters:
        padded = shard_shape(array, spec, tensor)
        for m in range(tensor):
            piece = ArraySlice(array.name, shard_index(array, spec, tensor, m))
            assert all(mine <= most for mine, most in zip(piece.shape, padded, strict=True))
            assert all(start <= stop for start, stop in piece.index)


@given(specs(), st.integers(1, 4))
def test_every_array_is_at_a_stage_and_only_a_tied_embedding_at_two(spec: ModelSpec, stages: int) -> None:
    ranges = split_layers(spec.config.layers, min(stages, spec.config.layers))
    for array in spec.parameters:
        holders = [stage for stage in range(len(ranges)) if stage_holds(array, spec, ranges, stage)]
        both_ends = array.name == "embedding" and spec.config.tied_embeddings and len(ranges) > 1
        assert holders == [0, len(ranges) - 1] if both_ends else len(holders) == 1


@given(specs())
def test_replicas_hold_the_same_parameters(spec: ModelSpec) -> None:
    shape = MeshShape(2, 1, 1)
    ranges = split_layers(spec.config.layers, 1)
    first, second = (slices_at(spec.parameters, spec, shape, ranges, position) for position in shape.positions())
    assert first == second and list(first) == [array.name for array in spec.parameters]


def test_three_tensor_shards_of_six_heads_and_two_kv_heads_share_the_kv_heads() -> None:
    spec = ModelSpec(DecoderConfig(vocab=7, width=4, layers=1, heads=6, kv_heads=2, head_size=2, mlp=8))
    assert [tensor_range(6, "heads", spec, 3, m) for m in range(3)] == [(0, 2), (2, 4), (4, 6)]
    assert [tensor_range(2, "kv_heads", spec, 3, m) for m in range(3)] == [(0, 2), (0, 2), (0, 2)]
    assert [tensor_range(7, "vocab", spec, 3, m) for m in range(3)] == [(0, 3), (3, 6), (6, 7)]
    assert tensor_degrees(spec, 8) == [1, 2, 3, 6]


def test_tensor_degree_that_does_not_divide_the_heads_is_refused() -> None:
    spec = ModelSpec(DecoderConfig(vocab=7, width=4, layers=1, heads=6, kv_heads=2, head_size=2, mlp=8))
    with pytest.raises(ValueError, match="4 must divide the 6 query heads"):
        shard_index(spec.parameters[0], spec, 4, 0)
