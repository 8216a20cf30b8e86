import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.meshes.shape import MeshShape, Position

degrees = st.integers(1, 5)


@given(degrees, degrees, degrees)
def test_positions_are_all_different_ordered_and_as_many_as_devices(d: int, p: int, m: int) -> None:
    shape = MeshShape(d, p, m)
    positions = list(shape.positions())
    assert len(positions) == len(set(positions)) == shape.devices == d * p * m
    assert positions == sorted(positions)
    assert positions[-1] == Position(d - 1, p - 1, m - 1)


@given(degrees, degrees, degrees)
def test_text_and_shape_are_each_others_inverse(d: int, p: int, m: int) -> None:
    shape = MeshShape(d, p, m)
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "2x3", "2x3x1x1", "2x-3x1", "axbxc", "2 x3x1", "2x3x", "1.0x1x1"])
def test_text_that_is_no_shape_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"DATAxSTAGExTENSOR"):
        MeshShape.parse(text)


@pytest.mark.parametrize("degrees", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, -2)])
def test_degrees_below_one_are_refused(degrees: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="degree must be at least 1"):
        MeshShape(*degrees)


def test_zero_in_text_is_refused_too() -> None:
    with pytest.raises(ValueError, match="stage degree must be at least 1, got 0"):
        MeshShape.parse("1x0x1")
