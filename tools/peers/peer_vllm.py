"""vLLM on the CPU: its engine in this process, step by step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{settings['threads'] - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        directory,
        dtype=settings["dtype"],
        max_model_len=settings["context"],
        max_num_seqs=settings["batch"],
        max_num_batched_tokens=settings["batch"] * settings["context"],
        enable_prefix_caching=False,
        enforce_eager=True,
    ).llm_engine
    runs = 0

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        nonlocal runs
        runs += 1
        sampling = SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        for row, prompt in enumerate(prompts):
            engine.add_request(f"{runs}-{row}", TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row = int(output.request_id.split("-")[1])
                for number in output.outputs[0].token_ids:
                    token(row, number)

    return generate
