"""A checkpoint is completed of parts of the right model only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import words
from serving_cases import SHARED_HEADS, RandomCheckpoint

from spotjax.checkpoint.completion import check_incomplete, complete
from spotjax.checkpoint.parameters import ParameterWriter
from spotjax.errors import CheckpointError
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint

WORDS = words(SHARED_HEADS.vocab).files()


def write_parts(directory: Path, dtype: str, seeds: tuple[int, ...]) -> None:
    """Parts of models with different weights, in turn."""
    writer = ParameterWriter(str(directory), SHARED_HEADS, dtype)
    weights = [RandomCheckpoint(SHARED_HEADS, seed) for seed in seeds]
    for number, (part, arrays) in enumerate(writer.parts.items()):
        read = weights[number % len(seeds)].read
        writer.write(part, {array.name: partial(read, array.name) for array in arrays.values()})
    writer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_the_expected_weights_become_a_checkpoint_others_do_not(tmp_path: Path, dtype: str) -> None:
    expected = fingerprint(RandomCheckpoint(SHARED_HEADS), np.dtype(dtype))  # type: ignore[arg-type]
    write_parts(tmp_path / "mixed", dtype, (0, 1))
    with pytest.raises(CheckpointError, match="parts of another model"):
        complete(str(tmp_path / "mixed"), SHARED_HEADS, dtype, WORDS, expected)
    check_incomplete(str(tmp_path / "mixed"))
    write_parts(tmp_path / "whole", dtype, (0,))
    complete(str(tmp_path / "whole"), SHARED_HEADS, dtype, WORDS, expected)
    assert fingerprint(OrbaxCheckpoint(tmp_path / "whole"), np.dtype(dtype)) == expected
    with pytest.raises(CheckpointError, match="complete checkpoint already"):
        check_incomplete(str(tmp_path / "whole"))
