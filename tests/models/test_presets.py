"""Presets have the sizes that were published for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spotjax.models.huggingface_config import read_config
from spotjax.models.presets import PRESETS, preset
from spotjax.planner.published_tables import TABLES

# Of the published checkpoints, tied embeddings counted once, without rows of OPT's positions that only padding has.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "opt-125m": 125_239_296 - 2 * 768, "opt-350m": 331_196_416 - 2 * 1024, "opt-1.3b": 1_315_758_080 - 2 * 2048,
    "opt-2.7b": 2_651_596_800 - 2 * 2560, "opt-13b": 12_853_473_280 - 2 * 5120,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_630_071_296, "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
}  # fmt: skip
# As papers and cards round them: of OPT the names, of Gemma 3 millions without and with embeddings.
MILLIONS = {
    "opt-30b": 30_000, "opt-66b": 65_700, "gemma-3-4b": 3209 + 675, "gemma-3-12b": 10_759 + 1012,
    "gemma-3-27b": 25_600 + 1416, "qwen2-57b-a14b": 57_400,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_exactly_the_published_number_of_parameters(name: str) -> None:
    assert sum(array.size for array in preset(name).parameters) == PARAMETERS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_presets_have_about_the_published_number_of_parameters(name: str) -> None:
    assert sum(array.size for array in preset(name).parameters) / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)


def test_every_preset_is_compared_with_something_published() -> None:
    assert set(PRESETS) == {*TABLES, *PARAMETERS, *MILLIONS}


def test_every_preset_is_named_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in text] == []


GEMMA2_27B = {
    "model_type": "gemma2", "vocab_size": 256_000, "hidden_size": 4608, "intermediate_size": 36_864, "head_dim": 128,
    "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 144, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "rope_theta": 10_000.0,
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA3_1B = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912,
    "head_dim": 256, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "max_position_embeddings": 32_768, "query_pre_attn_scalar": 256, "sliding_window": 512, "rope_theta": 1_000_000,
    "sliding_window_pattern": 6, "rope_local_base_freq": 10_000, "rope_scaling": None, "attn_logit_softcapping": None,
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
    "sliding_window": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu",
}  # fmt: skip
PUBLISHED = {
    "gemma-2-27b": GEMMA2_27B, "gemma-3-1b": GEMMA3_1B, "gemma-3-4b": GEMMA3_4B, "mistral-7b-v0.1": MISTRAL,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_reads_as_the_preset(tmp_path: Path, name: str) -> None:
    keys: dict[str, Any] = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert read_config(tmp_path / "config.json")[0] == preset(name).config
