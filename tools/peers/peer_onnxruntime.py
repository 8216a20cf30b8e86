"""onnxruntime-genai: its generator, token by token, on a model that its builder made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def prepare(weights: str, target: str) -> None:
    """See the package."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, "-m", weights, "-o", target, "-p", "fp32", "-e", "cpu"], check=True)


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    import onnxruntime_genai as genai

    config = genai.Config(directory)
    config.overlay(
        '{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}' % settings["threads"]  # noqa: UP031
    )
    model = genai.Model(config)

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        length = len(prompts[0]) + count
        options = genai.GeneratorParams(model)
        options.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            for row, number in enumerate(generator.get_next_tokens()):
                token(row, int(number))

    return generate
