"""The official ``openai`` package, unchanged, against the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from http_cases import PLAIN, RENDERED, Web, expected
from openai import AsyncOpenAI
from scripted_server import until

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(open_web: Web) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=open_web.url, api_key="any", max_retries=0, http_client=httpx2.AsyncClient(verify=PLAIN)
    ) as client:
        yield client


async def test_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert model == await client.models.retrieve("scripted")
    assert (model.id, model.owned_by, model.object) == ("scripted", "spotjax", "model")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("another/model")


async def test_a_chat_is_answered_whole(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="scripted", messages=HI, max_completion_tokens=9, seed=7)
    (choice,) = answer.choices
    assert choice.message.content == expected(RENDERED, 9) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(RENDERED), 9)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


async def test_without_a_limit_a_chat_may_take_all_that_its_prompt_leaves(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="scripted", messages=HI, seed=7)
    assert answer.usage is not None and answer.usage.total_tokens == 256


async def test_a_chat_is_streamed(client: AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="scripted", messages=HI, max_tokens=9, seed=7, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == expected(RENDERED, 9)
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "length")
    assert not usage.choices and usage.usage is not None and usage.usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_package_s_own_accumulating_stream_ends_with_the_same_answer(client: AsyncOpenAI) -> None:
    whole = expected(RENDERED, 9)
    async with client.chat.completions.stream(model="scripted", messages=HI, seed=7, stop=whole[7:]) as stream:
        final = await stream.get_final_completion()
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (whole[:7], "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_of_several_prompts(client: AsyncOpenAI, stream: bool) -> None:
    options: Any = {"model": "scripted", "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 5, "seed": 7}
    texts = dict.fromkeys(range(6), "")
    if stream:
        async for chunk in await client.completions.create(**options, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = await client.completions.create(**options)
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 * 2, 6 * 5)
    prompts = (b"a", b"b", b"c")
    assert texts == {
        at * 2 + choice: expected(prompt, 5, choice=choice, start=True)
        for at, prompt in enumerate(prompts)
        for choice in range(2)
    }


async def test_prompts_may_be_token_ids(client: AsyncOpenAI) -> None:
    one = await client.completions.create(model="scripted", prompt=[104, 105], max_tokens=5, seed=7)
    two = await client.completions.create(model="scripted", prompt=[[104, 105], [106]], max_tokens=5, seed=7)
    assert [one.choices[0].text, two.choices[1].text] == [expected(b"hi", 5), expected(b"j", 5)]
    assert two.choices[0].text == one.choices[0].text


async def test_without_a_limit_a_completion_has_16_tokens(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="scripted", prompt="x")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


async def test_output_stops_before_a_stop_text(client: AsyncOpenAI) -> None:
    whole = expected(RENDERED, 9)
    for stop in (whole[3:5], [whole[3:5], "never"]):
        answer = await client.chat.completions.create(model="scripted", messages=HI, max_tokens=9, seed=7, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (whole[:3], "stop")


async def test_log_probabilities_of_a_chat_name_tokens_and_bytes(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="scripted", messages=HI, max_tokens=3, seed=7, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    text = expected(RENDERED, 3)
    assert [(entry.token, entry.bytes, entry.logprob) for entry in logprobs.content] == [
        (letter, [ord(letter)], -1.0) for letter in text
    ]
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-1.0, -2.0]


async def test_log_probabilities_of_a_streamed_chat_are_the_same(client: AsyncOpenAI) -> None:
    tokens: list[str] = []
    async for chunk in await client.chat.completions.create(
        model="scripted", messages=HI, max_tokens=3, seed=7, logprobs=True, stream=True
    ):
        if (logprobs := chunk.choices[0].logprobs) is not None:
            assert logprobs.content is not None and not logprobs.content[0].top_logprobs
            tokens += [entry.token for entry in logprobs.content]
    assert "".join(tokens) == expected(RENDERED, 3)


async def test_log_probabilities_of_completions_say_where_tokens_begin(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="scripted", prompt="x", max_tokens=3, seed=7, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.text_offset, logprobs.token_logprobs) == ([0, 1, 2], [-1.0] * 3)
    letters = list(expected(b"x", 3, start=True))
    assert logprobs.tokens == letters
    assert [set(top) for top in logprobs.top_logprobs or ()] == [{"\0", letter} for letter in letters]


async def test_tools_reach_the_model_and_calls_are_part_of_the_text(client: AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 5}'}}
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    shown = b'system: Be\nbrief.\nuser: Hi\nassistant:  weather({"days":5})\ntool: rain\nassistant: '
    for choice, prompt in (("auto", b"tool weather\n" + shown), ("none", shown)):
        answer = await client.chat.completions.create(
            model="scripted", messages=messages, tools=[tool], tool_choice=choice, max_tokens=5, seed=7,  # type: ignore[arg-type]
        )  # fmt: skip
        assert answer.choices[0].message.content == expected(prompt, 5)


async def test_an_answer_can_be_sent_back_as_it_came(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="scripted", messages=HI, max_tokens=3)
    told: Any = answer.choices[0].message.model_dump()
    again = await client.chat.completions.create(model="scripted", messages=[*HI, told, *HI], max_tokens=3)
    assert again.usage is not None and answer.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


async def test_extensions_go_in_extra_body(client: AsyncOpenAI) -> None:
    first = ord(expected(RENDERED, 1))
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [first], "ignore_eos": True}
    answer = await client.chat.completions.create(
        model="scripted", messages=HI, max_tokens=3, seed=7, extra_body=extra,
        temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1, logit_bias={"65": -100},
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
    )  # fmt: skip
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")


async def test_errors_are_the_package_s_own(client: AsyncOpenAI, open_web: Web) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="scripted", messages=HI, temperature=-1)
    assert (raised.value.param, raised.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-5", messages=HI)
    assert missing.value.code == "model_not_found"
    open_web.service.overloaded = True
    with pytest.raises(openai.RateLimitError) as limited:
        await client.completions.create(model="scripted", prompt="x")
    assert limited.value.response.headers["retry-after"] == "2"
    open_web.backend.service = None
    with pytest.raises(openai.InternalServerError) as starting:
        await client.completions.create(model="scripted", prompt="x")
    assert starting.value.status_code == 503


async def test_the_package_tries_again_as_it_is_told(client: AsyncOpenAI, open_web: Web) -> None:
    open_web.service.overloaded = True
    patient = client.with_options(max_retries=2)

    async def recover() -> None:
        await asyncio.sleep(0.2)
        open_web.service.overloaded = False

    recovering = asyncio.create_task(recover())
    answer = await patient.completions.create(model="scripted", prompt="x", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    await recovering


async def test_a_client_that_gives_up_ends_its_request(web: Web) -> None:
    async with AsyncOpenAI(base_url=web.url, api_key="any", max_retries=0, timeout=0.2) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model="scripted", prompt="x")
        (request,) = web.service.requests.values()
        await until(lambda: request.ended)
        stream = await client.completions.create(model="scripted", prompt="x", stream=True, timeout=60, seed=7)
        web.steps.let(3)
        assert (await anext(stream)).choices[0].text
        await stream.close()
        await until(lambda: all(request.ended for request in web.service.requests.values()))
