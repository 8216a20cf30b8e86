"""CTranslate2: its generator with a callback, on a model that its converter made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(weights: str, target: str) -> None:
    """See the package."""
    converter = Path(sys.executable).parent / "ct2-transformers-converter"
    subprocess.run([converter, "--model", weights, "--output_dir", target, "--force"], check=True)


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    import ctranslate2

    words = json.loads((Path(directory) / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(
        directory, compute_type=settings["dtype"], inter_threads=1, intra_threads=settings["threads"]
    )

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        generator.generate_batch(
            [[words[number] for number in prompt] for prompt in prompts],
            beam_size=1, sampling_topk=1, max_length=count, min_length=count, end_token=[], static_prompt=None,
            include_prompt_in_result=False,
            callback=lambda step: token(step.batch_id, step.token_id),
        )  # fmt: skip

    return generate
