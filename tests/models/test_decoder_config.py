"""Which layers of a model are alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.models.config import DecoderConfig, LayerKind, RopeScaling, window_pattern
from spotjax.models.spec import ModelSpec

STRETCHED = RopeScaling("linear", 8.0)
CONFIG = DecoderConfig(
    vocab=8, width=8, layers=7, heads=1, kv_heads=1, head_size=8, mlp=8, rope_base=1e6, rope_scaling=STRETCHED
)
WINDOWS = st.lists(st.none() | st.integers(1, 3), min_size=1, max_size=12)


def test_layers_without_windows_are_alike() -> None:
    spec = ModelSpec(CONFIG)
    assert spec.kinds == (LayerKind(None, 1e6, STRETCHED),)
    assert spec.layer_kinds == (0,) * 7


def test_windows_repeat_over_the_layers() -> None:
    spec = ModelSpec(replace(CONFIG, windows=(4, 4, None)))
    assert spec.kinds == (LayerKind(4, 1e6, STRETCHED), LayerKind(None, 1e6, STRETCHED))
    assert spec.layer_kinds == (0, 0, 1, 0, 0, 1, 0)


def test_layers_with_a_window_rotate_unstretched_with_a_base_of_their_own() -> None:
    spec = ModelSpec(replace(CONFIG, windows=(4, None), local_rope_base=1e4))
    assert spec.kinds == (LayerKind(4, 1e4, None), LayerKind(None, 1e6, STRETCHED))


@given(WINDOWS)
def test_the_pattern_gives_every_layer_its_window(windows: list[int | None]) -> None:
    config = replace(CONFIG, layers=len(windows), windows=window_pattern(windows, max_positions=3))
    effective = [None if window == 3 else window for window in windows]
    assert [config.kind(layer).window for layer in range(len(windows))] == effective
    assert not config.windows or any(config.windows)


@pytest.mark.parametrize(
    ("windows", "pattern"),
    [
        ([None] * 4, ()),
        ([8, 9, None, 8], ()),
        ([4] * 3, (4,)),
        ([4, None, 4, None, 4], (4, None)),
        ([None, None, 4, 4], (None, None, 4, 4)),
    ],
)
def test_the_pattern_is_the_shortest(windows: list[int | None], pattern: tuple[int | None, ...]) -> None:
    assert window_pattern(windows, max_positions=8) == pattern


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"windows": (4, 0)}, "windows must be at least 1"),
        ({"attention_softcap": 0.0}, "attention_softcap must be positive, got 0.0"),
        ({"local_rope_base": -1.0}, "local_rope_base must be positive"),
        ({"zero_centered_norm": True, "norm": "layer"}, "zero_centered_norm needs norm 'rms'"),
        ({"parallel_residual": True, "norm_place": "both"}, "parallel_residual needs norm_place 'before'"),
    ],
)
def test_what_makes_no_model_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(CONFIG, **changes)
