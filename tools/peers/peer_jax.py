"""Bare jax: the model of Spotjax as one jitted function in a loop, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spotjax.models.catalog import open_model
from spotjax.tools.bare_loop import BareLoop


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    loop = BareLoop(open_model(directory))

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        for tokens in loop.steps(np.array(prompts, np.int32), count):
            for row, number in enumerate(tokens.tolist()):
                token(row, number)

    return generate
