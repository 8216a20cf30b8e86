"""Shards on devices: what ``assemble`` shows is what ``layout`` says, and no buffer is copied."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from serving_cases import EXPERTS, SHARED_HEADS, RandomCheckpoint, shard

from spotjax.meshes.layout import shard_index, shard_shape
from spotjax.meshes.sharding import array_sharding, assemble, replicated, stacked_shape, stage_mesh
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec

SPEC = ModelSpec(SHARED_HEADS)
DEGREES = (1, 2, 3, 4, 6)


def test_logical_axes_become_the_tensor_axis_of_the_stage() -> None:
    mesh, arrays = stage_mesh(jax.devices()[:3]), {array.name: array for array in SPEC.parameters}
    assert array_sharding(arrays["embedding"], SPEC, mesh).spec == PartitionSpec("tensor", None)
    assert array_sharding(arrays["layers.0.attention.key"], SPEC, mesh).spec == PartitionSpec(None, "tensor", None)
    assert replicated(mesh).spec == PartitionSpec()


@pytest.mark.parametrize(("tensor", "split"), [(2, ("tensor", None, None)), (3, (None, None, "tensor"))])
def test_experts_are_dealt_out_where_the_shards_divide_them_and_else_split(
    tensor: int, split: tuple[str | None, ...]
) -> None:
    spec, mesh = ModelSpec(EXPERTS), stage_mesh(jax.devices()[:tensor])
    gate = next(array for array in spec.parameters if array.name == "layers.0.mlp.gate")
    assert array_sharding(gate, spec, mesh).spec == PartitionSpec(*split)


def test_a_stage_keeps_its_devices_in_tensor_order() -> None:
    devices = [jax.devices()[number] for number in (5, 1, 3)]
    assert list(stage_mesh(devices).devices) == devices


@pytest.mark.parametrize("config", [SHARED_HEADS, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("tensor", DEGREES)
def test_assembled_shards_hold_exactly_their_part_of_every_array(tensor: int, config: DecoderConfig) -> None:
    weights, mesh = RandomCheckpoint(config), stage_mesh(jax.devices()[:tensor])
    spec = weights.spec
    for array in spec.parameters:
        buffers = [jax.device_put(shard(weights, array, tensor, m), mesh.devices[m]) for m in range(tensor)]
        whole = assemble(array, spec, mesh, buffers)
        assert whole.shape == stacked_shape(array, spec, tensor)
        assert whole.sharding == array_sharding(array, spec, mesh)
        for m, device in enumerate(mesh.devices):
            (held,) = [part.data for part in whole.addressable_shards if part.device == device]
            assert held.unsafe_buffer_pointer() == buffers[m].unsafe_buffer_pointer()
            assert held.shape == shard_shape(array, spec, tensor)
            index = shard_index(array, spec, tensor, m)
            part = np.asarray(held)[tuple(slice(stop - start) for start, stop in index)]
            np.testing.assert_array_equal(part, weights.read(array.name, index))


@pytest.mark.parametrize("config", [SHARED_HEADS, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("tensor", DEGREES)
def test_shards_cover_every_element_and_pad_with_zeros(tensor: int, config: DecoderConfig) -> None:
    weights = RandomCheckpoint(config)
    for array in weights.spec.parameters:
        seen = np.zeros(array.shape, bool)
        for m in range(tensor):
            index = shard_index(array, weights.spec, tensor, m)
            seen[tuple(slice(*extent) for extent in index)] = True
            content = shard(weights, array, tensor, m)
            content[tuple(slice(stop - start) for start, stop in index)] = 0
            assert not content.any()
        assert seen.all(), array.name
