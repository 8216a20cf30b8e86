from math import inf

from hypothesis import given
from hypothesis import strategies as st

from spotjax.meshes.layout import slices_at, split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import ArraySlice
from spotjax.meshes.stacks import arrays_in, depth, in_stack, stack_of, stacks_at
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from((1, 2, 4)), st.booleans())
def test_stacks_at_a_position_hold_exactly_the_arrays_that_belong_there(layers, stages, tensor, tied) -> None:
    spec = ModelSpec(DecoderConfig(11, 4, layers, 4, 2, 2, 7, tied_embeddings=tied))
    shape = MeshShape(2, min(stages, layers), tensor)
    ranges = split_layers(layers, shape.stage)
    for position in shape.positions():
        stacks = stacks_at(spec, shape, ranges, position)
        arrays = [piece for stack in stacks.items() for piece in arrays_in(ArraySlice(*stack))]
        expected = slices_at(spec.parameters, spec, shape, ranges, position)
        assert len(arrays) == len(expected) and dict(arrays) == expected


def test_an_array_is_one_layer_of_its_stack() -> None:
    piece = ArraySlice("layers.12.mlp.gate", ((0, 4), (2, 3)))
    assert in_stack(piece) == ArraySlice("layers.*.mlp.gate", ((12, 13), (0, 4), (2, 3)))
    assert list(arrays_in(in_stack(piece))) == [piece]
    assert stack_of("kv.3@0-1") == ("kv.*@0-1", 3) and stack_of("norm.scale") == ("norm.scale", None)


def test_depth_follows_the_model() -> None:
    names = ["head", "layers.10.mlp.up", "layers.9.mlp.up", "embedding"]
    assert sorted(names, key=depth) == list(reversed(names))
    config = DecoderConfig(11, 4, 3, 4, 2, 2, 7, positions="learned", embedding_width=3, norm="layer")
    depths = [depth(array.name) for array in ModelSpec(config).parameters]
    assert depths == sorted(depths) and [depths.count(end) for end in (-1, inf)] == [3, 4]
