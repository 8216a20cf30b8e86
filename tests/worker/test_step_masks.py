"""Masks meet their steps whichever comes first, and no step waits for masks that never come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from spotjax.engine.structure import Masks
from spotjax.worker.masks import StepMasks


def some(number: int) -> Masks:
    return Masks((0,), np.full((1, 2), number, np.int32), {})


@pytest.mark.parametrize("first", ["masks", "step"])
def test_masks_and_step_meet_whichever_comes_first(first: str) -> None:
    masks, wanted = StepMasks(), some(3)
    masks.open(["1.0", "1.1"])
    with ThreadPoolExecutor(1) as pool:
        if first == "masks":
            masks.put("1.0", 7, wanted)
        taken = pool.submit(masks.take, "1.0", 7)
        for other in (("1.1", 7), ("1.0", 8)):
            masks.put(*other, some(4))
        if first == "step":
            masks.put("1.0", 7, wanted)
        assert taken.result(30) is wanted
    assert masks.take("1.0", 8) is not wanted


def test_a_pipeline_of_the_past_waits_for_nothing_and_leaves_nothing_behind() -> None:
    masks = StepMasks()
    masks.open(["1.0"])
    masks.put("1.0", 1, some(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(masks.take, "1.0", 2)
        masks.open(["2.0"])
        assert waiting.result(30) is None
    masks.put("1.0", 3, some(1))
    assert masks.take("1.0", 1) is None and masks.take("1.0", 3) is None
    assert not masks._masks
