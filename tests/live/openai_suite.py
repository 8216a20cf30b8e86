"""The official ``openai`` package for Python, unchanged, against a running server, as ``openai_node/suite.mjs`` is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import openai
from openai import AsyncOpenAI

MESSAGES: list[Any] = [{"role": "user", "content": "Who is there?"}]


async def suite(url: str) -> dict[str, Any]:
    """What came of each call."""
    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        drawn: dict[str, Any] = {"model": model, "temperature": 0.8, "seed": 11}
        ask = client.chat.completions.create
        told: dict[str, Any] = {"models": [model, (await client.models.retrieve(model)).id]}

        chat = await ask(**drawn, messages=MESSAGES, max_completion_tokens=24)
        told["chat"] = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.total_tokens]

        text, usage = "", None
        async for chunk in await ask(
            **drawn, messages=MESSAGES, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}
        ):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        told["stream"] = [text, usage.total_tokens if usage is not None else None]

        completion = await client.completions.create(**drawn, prompt=["ROMEO:\n", "JULIET:\n"], max_tokens=12)
        told["completion"] = [choice.text for choice in completion.choices]

        several = await ask(**drawn, messages=MESSAGES, max_completion_tokens=8, n=3)
        told["n"] = [choice.message.content for choice in several.choices]

        stopped = await ask(**drawn, messages=MESSAGES, max_completion_tokens=24, stop=["e"])
        told["stop"] = [stopped.choices[0].message.content, stopped.choices[0].finish_reason]

        probable = await ask(**drawn, messages=MESSAGES, max_completion_tokens=4, logprobs=True, top_logprobs=2)
        told["logprobs"] = [
            [entry.bytes, round(entry.logprob, 4), len(entry.top_logprobs)]
            for entry in probable.choices[0].logprobs.content
        ]

        told["errors"] = [
            await name_of(ask(model=model, messages=MESSAGES, temperature=-1)),
            await name_of(ask(model=model, messages=MESSAGES, extra_body={"nonsense": 1})),
            await name_of(ask(model="another", messages=MESSAGES)),
            await name_of(
                client.completions.create(
                    model=model, prompt="x", max_tokens=200, extra_body={"ignore_eos": True}, timeout=0.02
                )
            ),
        ]

        def crowd(retries: int) -> list[Awaitable[Any]]:
            asking = client.with_options(max_retries=retries).completions
            extra = {"ignore_eos": True}
            return [asking.create(model=model, prompt="x", max_tokens=16, seed=1, extra_body=extra) for _ in range(24)]

        told["refused"] = sorted(set(await asyncio.gather(*map(name_of, crowd(0)))))
        patient = await asyncio.gather(*crowd(20))
        told["patient"] = len({answer.choices[0].text for answer in patient})
        return told


async def name_of(call: Awaitable[Any]) -> str:
    """Of the error that a call ends with."""
    try:
        await call
    except openai.OpenAIError as error:
        return type(error).__name__
    return "none"
