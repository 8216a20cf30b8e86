"""Shards on devices: what ``assemble`` shows is what ``layout`` says, and no buffer is copied."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from serving_cases import SHARED_HEADS, RandomCheckpoint, shard

from spotjax.meshes.layout import shard_index, shard_shape
from spotjax.meshes.sharding import array_sharding, assemble, partition_spec, replicated, stacked_shape, stage_mesh
from spotjax.models.spec import ModelSpec

SPEC = ModelSpec(SHARED_HEADS)
DEGREES = (1, 2, 3, 4, 6)


def test_logical_axes_become_the_tensor_axis_of_the_stage() -> None:
    assert partition_spec(("vocab", "embed")) == PartitionSpec("tensor", None)
    assert partition_spec(("embed", "kv_heads", "head_size")) == PartitionSpec(None, "tensor", None)
    assert replicated(stage_mesh(jax.devices()[:3])).spec == PartitionSpec()


def test_a_stage_keeps_its_devices_in_tensor_order() -> None:
    devices = [jax.devices()[number] for number in (5, 1, 3)]
    assert list(stage_mesh(devices).devices) == devices


@pytest.mark.parametrize("tensor", DEGREES)
def test_assembled_shards_hold_exactly_their_part_of_every_array(tensor: int) -> None:
    weights, mesh = RandomCheckpoint(SHARED_HEADS), stage_mesh(jax.devices()[:tensor])
    for array in SPEC.parameters:
        buffers = [jax.device_put(shard(weights, array, tensor, m), mesh.devices[m]) for m in range(tensor)]
        whole = assemble(array, SPEC, mesh, buffers)
        assert whole.shape == stacked_shape(array, SPEC, tensor)
        assert whole.sharding == array_sharding(array, mesh)
        for m, device in enumerate(mesh.devices):
            (held,) = [part.data for part in whole.addressable_shards if part.device == device]
            assert held.unsafe_buffer_pointer() == buffers[m].unsafe_buffer_pointer()
            assert held.shape == shard_shape(array, SPEC, tensor)
            index = shard_index(array, SPEC, tensor, m)
            part = np.asarray(held)[tuple(slice(stop - start) for start, stop in index)]
            np.testing.assert_array_equal(part, weights.read(array.name, index))


@pytest.mark.parametrize("tensor", DEGREES)
def test_shards_cover_every_element_and_pad_with_zeros(tensor: int) -> None:
    weights = RandomCheckpoint(SHARED_HEADS)
    for array in SPEC.parameters:
        seen = np.zeros(array.shape, bool)
        for m in range(tensor):
            index = shard_index(array, SPEC, tensor, m)
            seen[tuple(slice(*extent) for extent in index)] = True
            content = shard(weights, array, tensor, m)
            content[tuple(slice(stop - start) for start, stop in index)] = 0
            assert not content.any()
        assert seen.all(), array.name
