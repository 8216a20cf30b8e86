import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spotjax.meshes.slices import ArraySlice, Index, intersect, relative, subtract, whole

EXTENT = 6


@st.composite
def boxes(draw: st.DrawFn, axes: int) -> Index:
    ranges = st.tuples(st.integers(0, EXTENT), st.integers(0, EXTENT)).map(lambda r: (min(r), max(r)))
    return tuple(draw(ranges) for _ in range(axes))


def mask(*indices: Index) -> np.ndarray:
    """How many of the indices cover each element."""
    counts = np.zeros((EXTENT,) * len(indices[0]), dtype=int)
    for index in indices:
        counts[tuple(slice(*r) for r in index)] += 1
    return counts


pairs = st.integers(1, 3).flatmap(lambda axes: st.tuples(boxes(axes), boxes(axes)))


@given(pairs)
def test_intersection_is_what_both_cover(pair: tuple[Index, Index]) -> None:
    a, b = pair
    common = intersect(a, b)
    both = (mask(a) * mask(b)).astype(bool)
    if common is None:
        assert not both.any()
    else:
        assert (mask(common).astype(bool) == both).all() and both.any()
    assert common == intersect(b, a)


@given(pairs)
def test_difference_is_disjoint_and_covers_exactly_what_is_left(pair: tuple[Index, Index]) -> None:
    a, b = pair
    rest = subtract(a, b)
    covered = sum((mask(box) for box in rest), np.zeros((EXTENT,) * len(a), dtype=int))
    assert (covered == mask(a) * (1 - mask(b))).all()
    if intersect(a, b) is not None:
        assert all(ArraySlice("x", box).size for box in rest)


@given(pairs)
def test_relative_finds_the_inner_box_inside_the_outer(pair: tuple[Index, Index]) -> None:
    outer, inner = pair[0], intersect(*pair)
    if inner is None:
        return
    array = np.arange(EXTENT ** len(outer)).reshape((EXTENT,) * len(outer))
    held = array[tuple(slice(*r) for r in outer)]
    assert (held[relative(inner, outer)] == array[tuple(slice(*r) for r in inner)]).all()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_whole_has_the_shape_and_size_of_the_array(shape: tuple[int, ...]) -> None:
    piece = ArraySlice("x", whole(shape))
    assert piece.shape == shape and piece.size == np.prod(shape)
    assert subtract(piece.index, piece.index) == []
