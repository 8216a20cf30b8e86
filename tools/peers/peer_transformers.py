"""Hugging Face transformers: its model in a loop with its dynamic cache, eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, settings["dtype"])).eval()

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        tokens, cache = torch.tensor(prompts), None
        with torch.inference_mode():
            for _ in range(count):
                out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
                for row, number in enumerate(tokens[:, 0].tolist()):
                    token(row, number)

    return generate
