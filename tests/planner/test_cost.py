from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import fleet, kind, llama, shapes, specs

from spotjax.meshes.layout import shard_shape, slices_at, split_layers
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import (
    CALL_SECONDS,
    decode_seconds,
    experts_read,
    memory_need,
    parameter_bytes,
    prefill_seconds,
    step_seconds,
    throughput,
)
from spotjax.planner.demand import Demand

LARGE = ModelSpec(
    DecoderConfig(vocab=32_000, width=4096, layers=32, heads=32, kv_heads=32, head_size=128, mlp=11_008), 2
)


@given(st.data())
def test_parameter_bytes_are_those_of_the_padded_slices_at_the_position(data: st.DataObject) -> None:
    spec = data.draw(specs())
    shape = data.draw(shapes(spec, fleet(4, 4, 4)))
    layers = split_layers(spec.config.layers, shape.stage)
    arrays = {array.name: array for array in spec.parameters}
    for stage in range(shape.stage):
        held = slices_at(spec.parameters, spec, shape, layers, Position(0, stage, 0))
        padded = sum(ArraySlice(name, index).size * spec.element_bytes(name) for name, index in held.items())
        assert parameter_bytes(spec, shape, layers, stage) == padded
        assert all(ArraySlice(n, i).shape == shard_shape(arrays[n], spec, shape.tensor) for n, i in held.items())


@given(st.data())
def test_kv_bytes_are_those_of_the_pages_that_the_longest_stage_holds(data: st.DataObject) -> None:
    spec = data.draw(specs())
    shape = data.draw(shapes(spec, fleet(4, 4, 4)))
    layers = split_layers(spec.config.layers, shape.stage)
    demand = Demand(page_size=4, kv_pages=data.draw(st.integers(1, 9)))
    array = spec.kv_array(0, demand.pages, 4)
    elements = ArraySlice("kv", tuple((0, n) for n in shard_shape(array, spec, shape.tensor))).size
    most = max(memory_need(spec, shape, layers, demand).kv, 0)
    assert most % (elements * spec.dtype_bytes) == 0
    held = most // (elements * spec.dtype_bytes)
    assert held in {stop - start for start, stop in layers}


def test_memory_need_counts_parameters_kv_and_a_margin() -> None:
    need = memory_need(LARGE, MeshShape(1, 1, 1), ((0, 32),), Demand(batch=4, prompt=1024, output=0 + 1024))
    assert need.parameters == LARGE.parameter_bytes
    assert need.kv == 4 * 2048 * LARGE.kv_bytes_per_position
    assert need.activations > 0
    assert need.total > need.parameters + need.kv + need.activations


def test_decoding_one_sequence_takes_as_long_as_reading_the_parameters() -> None:
    v100 = kind(4, flops=1.25e14)
    read = (LARGE.parameter_bytes - 32_000 * 4096 * 2) / v100.memory_bandwidth
    seconds = decode_seconds(LARGE, MeshShape(1, 1, 1), ((0, 32),), v100, 1, 1)
    assert seconds == pytest.approx(read + CALL_SECONDS, rel=1e-3)


def test_int8_weights_are_a_quarter_of_the_bytes_of_float32_and_are_read_in_as_much_of_the_time() -> None:
    v100 = kind(4, flops=1.25e14)
    wide, narrow = (replace(LARGE, dtype_bytes=4, quantization=how) for how in ("none", "int8"))
    one = MeshShape(1, 1, 1), ((0, 32),)
    sizes = [parameter_bytes(spec, *one, 0) for spec in (wide, narrow)]
    assert sizes == [wide.parameter_bytes, narrow.parameter_bytes]
    assert 0.25 < sizes[1] / sizes[0] < 0.251, "scales and norms are all that is beside int8"
    seconds = [decode_seconds(spec, *one, v100, 1, 1) - CALL_SECONDS for spec in (wide, narrow)]
    assert seconds[1] / seconds[0] == pytest.approx(0.25, rel=1e-2)


def test_prefilling_many_tokens_takes_as_long_as_computing_them() -> None:
    v100 = kind(4, flops=1.25e14)
    tokens = 2048
    flops = 2 * tokens * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008) + 2 * 32 * tokens**2 * 4096
    seconds = prefill_seconds(LARGE, MeshShape(1, 1, 1), ((0, 32),), v100, tokens)
    assert seconds == pytest.approx(flops / v100.flops + CALL_SECONDS, rel=1e-2)


def test_tensor_degree_divides_the_reading_and_adds_collectives() -> None:
    one, four = MeshShape(1, 1, 1), MeshShape(1, 1, 4)
    slow, fast = kind(4), replace(kind(4), link_bandwidth=1e30)
    alone = decode_seconds(LARGE, one, ((0, 32),), slow, 8, 512)
    split = decode_seconds(LARGE, four, ((0, 32),), slow, 8, 512)
    assert alone / 4 < split < alone
    assert decode_seconds(LARGE, four, ((0, 32),), fast, 8, 512) < split


def test_stages_overlap_micro_batches() -> None:
    spec, shape = LARGE, MeshShape(1, 4, 1)
    layers = split_layers(32, 4)
    alone = decode_seconds(spec, shape, layers, kind(1), 2, 512)
    assert step_seconds(spec, shape, layers, kind(1), 8, 512) < 1.5 * alone
    assert throughput(spec, shape, layers, kind(1), 8, 512) > 2.5 * throughput(spec, shape, layers, kind(1), 2, 512)


@given(st.integers(1, 64), st.integers(1, 4096))
def test_more_sequences_and_longer_contexts_never_take_less_time(batch: int, context: int) -> None:
    shape, layers = MeshShape(1, 3, 2), split_layers(32, 3)
    now = step_seconds(LARGE, shape, layers, kind(2), batch, context)
    assert step_seconds(LARGE, shape, layers, kind(2), batch + 1, context) >= now
    assert step_seconds(LARGE, shape, layers, kind(2), batch, context + 1) >= now


def test_replicas_multiply_throughput() -> None:
    layers = split_layers(5, 2)
    spec = llama()
    one = throughput(spec, MeshShape(1, 2, 1), layers, kind(1), 4, 32)
    assert throughput(spec, MeshShape(3, 2, 1), layers, kind(1), 4, 32) == pytest.approx(3 * one)


def test_demand_counts_pages_for_typical_requests_and_refuses_numbers_below_one() -> None:
    assert Demand(batch=3, prompt=10, output=7, page_size=4).pages == 3 * 5
    assert Demand(batch=3, kv_pages=2).pages == 2
    with pytest.raises(ValueError, match="kv_pages must be at least 1, got 0"):
        Demand(kv_pages=0)


def mixture(count: int, per_token: int, mlp: int, heads: int = 8) -> ModelSpec:
    config = DecoderConfig(
        vocab=64,
        width=64,
        layers=2,
        heads=heads,
        kv_heads=heads,
        head_size=8,
        mlp=mlp,
        experts=Experts(count, per_token),
    )
    return ModelSpec(config)


@pytest.mark.parametrize(("count", "per_token", "tokens"), [(8, 2, 1), (8, 2, 4), (60, 4, 8), (16, 16, 3)])
def test_experts_read_are_those_that_random_choices_hit(count: int, per_token: int, tokens: int) -> None:
    chance = np.random.default_rng(1)
    hits = [
        len({int(n) for _ in range(tokens) for n in chance.permutation(count)[:per_token]}) / count for _ in range(2000)
    ]
    read = experts_read(mixture(count, per_token, 4096), 2, tokens)
    assert read == pytest.approx(np.mean(hits), rel=0.02)
    assert read * count <= min(count, tokens * per_token) + 1e-9


@pytest.mark.parametrize(("tensor", "tokens"), [(2, 1), (4, 4), (8, 1), (8, 16)])
def test_of_shards_with_whole_experts_the_busiest_counts(tensor: int, tokens: int) -> None:
    chance, (count, per_token) = np.random.default_rng(2), (64, 8)
    busiest = []
    for _ in range(500):
        chosen = {int(n) for _ in range(tokens) for n in chance.permutation(count)[:per_token]}
        busiest.append(np.bincount([n * tensor // count for n in chosen]).max())
    read = experts_read(mixture(count, per_token, 16), tensor, tokens)
    assert read * count / tensor == pytest.approx(np.mean(busiest), rel=0.35)


def test_an_expert_that_is_not_chosen_costs_memory_only() -> None:
    few, many = mixture(8, 2, 4096), mixture(64, 2, 4096)
    shape, layers, box = MeshShape(1, 1, 1), split_layers(2, 1), kind(1)
    assert parameter_bytes(many, shape, layers, 0) > 7 * parameter_bytes(few, shape, layers, 0)
    one, other = (decode_seconds(spec, shape, layers, box, 1, 1) for spec in (few, many))
    assert one == pytest.approx(other, rel=0.01)
    batch, larger = (decode_seconds(many, shape, layers, box, size, 1) for size in (1, 8))
    assert 4 * (batch - CALL_SECONDS) < larger - CALL_SECONDS < 8 * (batch - CALL_SECONDS)
