"""What the comparison of engines writes for them, and how it counts what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spotjax.meshes.slices import whole
from spotjax.models.catalog import open_model
from spotjax.tools import peer_models
from spotjax.tools.bench_peers import PEERS, SCRIPT, figures
from spotjax.tools.peer_models import write_model

SMALL = peer_models.DecoderConfig(
    vocab=300, width=64, layers=2, heads=4, kv_heads=2, head_size=16, mlp=96, max_positions=128
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as engines are given it."""
    monkeypatch.setattr(peer_models, "RANDOM_CONFIG", SMALL)
    write_model(peer_models.RANDOM, tmp_path, seed=3)
    return tmp_path


def test_every_format_holds_the_same_weights_and_tokens(weights: Path) -> None:
    ours, float32, bfloat16 = (
        open_model(str(path)) for path in (weights, weights / "model-f32.gguf", weights / "model-bf16.gguf")
    )
    for array in ours.checkpoint.spec.parameters:
        expected = ours.checkpoint.read(array.name, whole(array.shape))
        np.testing.assert_array_equal(float32.checkpoint.read(array.name, whole(array.shape)), expected)
        np.testing.assert_allclose(bfloat16.checkpoint.read(array.name, whole(array.shape)), expected, rtol=2**-7)
    text = "abc xyz"
    assert float32.tokenizer.encode(text, False) == ours.tokenizer.encode(text, False)
    assert float32.checkpoint.spec.config == ours.checkpoint.spec.config


def test_bare_jax_runs_as_a_peer_and_says_what_it_measured(weights: Path, tmp_path: Path) -> None:
    job = {
        "prepare": False, "directory": str(weights), "weights": str(weights), "count": 5, "repeats": 2,
        "prompts": [[1, 2, 3], [4, 5, 6]],
        "settings": {"threads": 2, "batch": 2, "context": 16, "prompt": 3, "count": 5, "dtype": "float32"},
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, SCRIPT, PEERS["bare jax"].module, tmp_path / "job.json", tmp_path / "result.json"]
    subprocess.run([str(part) for part in command], check=True, timeout=120)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["runs"]) == 2 and result["peak_bytes"] > 1e7
    first, second = (run["tokens"] for run in result["runs"])
    assert first == second and [len(row) for row in first] == [5, 5]
    assert all(times == sorted(times) for run in result["runs"] for times in run["times"])
    assert figures([result], first)["same_tokens"] == 1.0


def test_figures_are_those_of_the_time_in_which_all_rows_decode() -> None:
    times = [[1.0, 2.0, 4.0, 6.0], [3.0, 4.0, 6.0, 8.0]]
    run = {"times": times, "tokens": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    found = figures([{"runs": [run], "peak_bytes": 5_000_000}], [[1, 2, 3, 0], [5, 6, 7, 8]])
    assert found == {
        "first_token_ms": 3000.0,  # of the second row
        "inter_token_ms": 2000.0,  # 2 s between 4 and 6 in both rows, 1 s from 3 to 4, 2 s from 6 to 8
        "least_inter_token_ms": 2000.0,
        "output_tokens_per_second": 5 / 5.0,
        "with_prompts_tokens_per_second": 8 / 8.0,
        "tokens": 8,
        "peak_megabytes": 5.0,
        "same_tokens": 7 / 8,
    }


def test_a_row_that_ends_early_counts_with_the_tokens_it_has() -> None:
    run = {"times": [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0]], "tokens": [[1, 2, 3, 4], [5, 6]]}
    found = figures([{"runs": [run], "peak_bytes": 5}], [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert (found["tokens"], found["output_tokens_per_second"], found["same_tokens"]) == (6, 4 / 3, 6 / 8)
