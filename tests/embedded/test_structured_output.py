"""Output within a structure matches, and is the same, whatever is taken at whatever moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from embedded_cases import CONFIG
from serving_cases import RandomCheckpoint

from spotjax.models.catalog import Model, open_model
from spotjax.tools.chaos_structured import chaos

RUNS, WAVE = 8, 4
SMALL = {"max_batch": WAVE, "prefill_tokens": 16, "page_size": 8, "max_model_len": 512, "mesh": "1x2x1"}


def test_structures_are_kept_to_over_preemptions_and_a_restart_of_the_controller(
    programs: Path, tmp_path: Path
) -> None:
    tokenizer = open_model("tiny").tokenizer
    config = replace(CONFIG, vocab=tokenizer.vocab_size, max_positions=512)
    model = Model("random", RandomCheckpoint(config), tokenizer)  # type: ignore[arg-type]
    settings = {**SMALL, "compilation_cache": str(programs)}
    verdict = asyncio.run(chaos(model, tmp_path, RUNS, seed=5, restarts=1, wave=WAVE, **settings))
    assert verdict.wrong == []
    assert verdict.interrupted >= RUNS and verdict.preemptions and verdict.restarts == 1
