"""The Generation service over a real connection, before a scripted engine."""

import asyncio

import grpc
import pytest
from scripted_server import Running, until

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.requests import Structure as StructureFields
from spotjax.api.requests import generate_request
from spotjax.api.validation import ServedModel, accepted_request
from spotjax.engine.request import FinishReason
from spotjax.engine.structure import Structure, StructureKind
from spotjax.errors import InvalidRequest, LogUnavailable
from spotjax.testing.scripted_generation import scripted_token
from spotjax.testing.scripted_service import ByteTokenizer

PROMPT = [256, *b"hello"]


def expected(count: int, seed: int = 7, choice: int = 0, prompt: list[int] = PROMPT) -> list[int]:
    return [scripted_token(prompt, seed, choice, position) for position in range(count)]


def hello(max_tokens: int = 8, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=max_tokens, seed=7), **fields)


def tokens_of(responses: list[pb.GenerateResponse], choice: int = 0) -> list[int]:
    """Tokens of a choice, checked to be gapless from the first offset on."""
    mine = [response for response in responses if response.choice == choice]
    tokens: list[int] = []
    for response in mine:
        assert response.offset == mine[0].offset + len(tokens)
        tokens.extend(response.token_ids)
    return tokens


async def test_streams_tokens_text_finish_reason_and_usage(open_server: Running) -> None:
    responses = [response async for response in open_server.generation.Generate(hello(request_id="mine"))]
    assert tokens_of(responses) == expected(8)
    assert "".join(response.text for response in responses) == bytes(expected(8)).decode()
    assert {response.request_id for response in responses} == {"mine"}
    assert not any(response.finish_reason for response in responses[:-1])
    assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert responses[-1].usage == pb.Usage(prompt_tokens=6, completion_tokens=8)


async def test_a_token_is_sent_as_soon_as_it_is_committed(running: Running) -> None:
    call = running.generation.Generate(hello())
    for position, token in enumerate(expected(3)):
        running.steps.let(1)
        response = await call.read()
        assert (response.offset, list(response.token_ids)) == (position, [token])


async def test_initial_metadata_names_the_request_before_the_first_token(running: Running) -> None:
    metadata = dict(await running.generation.Generate(hello(request_id="mine")).initial_metadata())
    assert metadata["spotjax-request-id"] == "mine"
    metadata = dict(await running.generation.Generate(hello()).initial_metadata())
    assert metadata["spotjax-request-id"] in running.service.requests


async def test_a_request_is_said_to_be_accepted_once_it_is_on_record(running: Running) -> None:
    recording = asyncio.Semaphore(0)
    running.service._record = recording.acquire
    running.steps.let_all()
    call = running.generation.Generate(hello(request_id="r"))
    told = asyncio.create_task(call.initial_metadata())
    await until(lambda: "r" in running.service.requests)
    assert (await running.generation.Models(pb.ModelsRequest())).models and not told.done()
    recording.release()
    assert dict(await told)["spotjax-request-id"] == "r"
    assert tokens_of([response async for response in call]) == expected(8)


async def test_a_request_that_cannot_be_recorded_is_refused_and_its_id_is_free(running: Running) -> None:
    async def full() -> None:
        raise LogUnavailable("the commit log cannot be written: disk full")

    running.service._record = full
    call = running.generation.Generate(hello(request_id="r"))
    with pytest.raises(grpc.aio.AioRpcError, match="disk full") as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ("spotjax-error", "LogUnavailable") in tuple(failure.value.trailing_metadata())
    running.service._record = None
    running.steps.let_all()
    assert tokens_of([r async for r in running.generation.Generate(hello(request_id="r"))]) == expected(8)


async def test_who_follows_a_request_that_is_refused_late_is_told(running: Running) -> None:
    late = asyncio.Event()

    async def full() -> None:
        await late.wait()
        raise LogUnavailable("the commit log cannot be written: disk full")

    running.service._record = full
    accepted = running.generation.Generate(hello(request_id="r"))
    await until(lambda: "r" in running.service.requests)
    following = running.generation.Resume(pb.ResumeRequest(request_id="r"))
    assert dict(await following.initial_metadata())["spotjax-request-id"] == "r"
    late.set()
    with pytest.raises(grpc.aio.AioRpcError, match="could not be recorded; send it again") as failure:
        await asyncio.wait_for(following.read(), 20)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert await accepted.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("resumable", [False, True])
async def test_a_client_that_leaves_before_its_request_is_on_record(running: Running, resumable: bool) -> None:
    recording = asyncio.Semaphore(0)
    running.service._record = recording.acquire
    call = running.generation.Generate(hello(request_id="r", resumable=resumable))
    await until(lambda: "r" in running.service.requests)
    left = running.service.requests["r"]
    call.cancel()
    await asyncio.wait([asyncio.ensure_future(call.code())])
    assert (await running.generation.Models(pb.ModelsRequest())).models  # the server knows that the client left
    recording.release()
    await until(lambda: left.recorded and (left.ended or resumable))
    assert left.ended == (None if resumable else FinishReason.CANCELLED)


async def test_choices_are_independent_streams_of_one_call(open_server: Running) -> None:
    responses = [response async for response in open_server.generation.Generate(hello(n=3))]
    for choice in range(3):
        assert tokens_of(responses, choice) == expected(8, choice=choice)
    assert len([response for response in responses if response.finish_reason]) == 3


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (pb.GenerateRequest(text="hé"), [256, *"hé".encode()]),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 257, 0])), [1, 257, 0]),
        (
            pb.GenerateRequest(
                chat=pb.ChatMessages(
                    messages=[
                        pb.ChatMessage(role=pb.ChatMessage.ROLE_SYSTEM, content="be"),
                        pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="hi"),
                    ]
                )
            ),
            list(b"system: be\nuser: hi\nassistant: "),
        ),
    ],
)
async def test_every_input_becomes_its_tokens(
    open_server: Running, request_: pb.GenerateRequest, prompt: list[int]
) -> None:
    request_.sampling.seed = 3
    responses = [response async for response in open_server.generation.Generate(request_)]
    assert tokens_of(responses) == expected(16, seed=3, prompt=prompt)


async def test_every_sampling_field_reaches_the_engine(open_server: Running) -> None:
    sampling = pb.Sampling(
        max_tokens=3,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        seed=2**64 - 1,
        repetition_penalty=1.1,
        presence_penalty=-1.5,
        frequency_penalty=0.25,
        logit_bias={5: -100, 6: 0.5},
        logprobs=2,
        stop=["zz"],
        stop_token_ids=[9],
        ignore_eos=True,
        structure=pb.Structure(grammar='start: "x"'),
    )
    assert {field.name for field, _ in sampling.ListFields()} == set(pb.Sampling.DESCRIPTOR.fields_by_name)
    responses = [
        response
        async for response in open_server.generation.Generate(
            pb.GenerateRequest(text="x", sampling=sampling, request_id="r")
        )
    ]
    taken = open_server.service.requests["r"].request.sampling
    for name in set(pb.Sampling.DESCRIPTOR.fields_by_name) - {"logit_bias", "stop", "stop_token_ids", "structure"}:
        assert getattr(taken, name) == getattr(sampling, name), name
    assert taken.logit_bias == {5: -100, 6: 0.5}
    assert taken.structure == Structure(StructureKind.GRAMMAR, 'start: "x"')
    assert (taken.stop, taken.stop_token_ids) == (("zz",), (9,))
    assert sum(len(response.logprobs) for response in responses) == 3
    assert [top.token_id for top in responses[0].logprobs[0].top] == [0, 1]


async def test_unset_fields_take_the_documented_defaults(open_server: Running) -> None:
    for request_id in ("a", "b"):
        async for _ in open_server.generation.Generate(pb.GenerateRequest(text="x", request_id=request_id)):
            pass
    a, b = (open_server.service.requests[request_id].request for request_id in "ab")
    assert (a.n, a.resumable, a.sampling.max_tokens, a.sampling.temperature) == (1, False, 16, 1.0)
    assert (a.sampling.top_p, a.sampling.repetition_penalty, a.sampling.logprobs) == (1.0, 1.0, None)
    assert a.sampling.seed != b.sampling.seed


async def test_top_k_beyond_the_vocabulary_keeps_all(open_server: Running) -> None:
    sampling = pb.Sampling(top_k=2**32 - 1)
    async for _ in open_server.generation.Generate(pb.GenerateRequest(text="x", request_id="r", sampling=sampling)):
        pass
    assert open_server.service.requests["r"].request.sampling.top_k == 258


async def test_stop_text_ends_a_choice_and_is_not_part_of_it(open_server: Running) -> None:
    text = bytes(expected(8)).decode()
    request = hello()
    request.sampling.stop.append(text[3:5])
    responses = [response async for response in open_server.generation.Generate(request)]
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert "".join(response.text for response in responses) == text[: text.index(text[3:5])]


async def test_a_disconnect_ends_the_request(running: Running) -> None:
    call = running.generation.Generate(hello(request_id="r"))
    running.steps.let(1)
    await call.read()
    call.cancel()
    await until(lambda: running.service.requests["r"].ended)
    assert running.service.requests["r"].ended is FinishReason.CANCELLED


async def test_a_disconnect_before_the_first_token_ends_the_request(running: Running) -> None:
    call = running.generation.Generate(hello(request_id="r"))
    await call.initial_metadata()
    call.cancel()
    await until(lambda: running.service.requests["r"].ended)


async def test_a_passed_deadline_ends_the_request(running: Running) -> None:
    call = running.generation.Generate(hello(request_id="r"), timeout=0.1)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: running.service.requests["r"].ended)
    assert running.service.requests["r"].ended is FinishReason.DEADLINE


@pytest.mark.parametrize("timeout", [None, 0.1])
async def test_a_resumable_request_survives_disconnect_and_deadline(running: Running, timeout: float | None) -> None:
    call = running.generation.Generate(hello(request_id="r", resumable=True), timeout=timeout)
    running.steps.let(3)
    seen = [await call.read()]
    if timeout is None:
        call.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            while True:
                await call.read()
    running.steps.let_all()
    offsets = [len(seen[0].token_ids)]
    rest = [r async for r in running.generation.Resume(pb.ResumeRequest(request_id="r", offsets=offsets))]
    assert tokens_of([*seen, *rest]) == expected(8)
    assert rest[-1].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("offsets", [[], [0, 0], [3, 8], [8, 8], [0, 5]])
async def test_resume_gives_each_unseen_token_once(open_server: Running, offsets: list[int]) -> None:
    async for _ in open_server.generation.Generate(hello(request_id="r", n=2, resumable=True)):
        pass
    request = pb.ResumeRequest(request_id="r", offsets=offsets)
    rest = [response async for response in open_server.generation.Resume(request)]
    for choice in range(2):
        seen = offsets[choice] if offsets else 0
        assert expected(8, choice=choice)[:seen] + tokens_of(rest, choice) == expected(8, choice=choice)
        assert [r.finish_reason for r in rest if r.choice == choice][-1] == pb.FINISH_REASON_LENGTH


async def test_streams_of_one_request_are_independent(running: Running) -> None:
    first = running.generation.Generate(hello(request_id="r", resumable=True))
    await first.initial_metadata()
    second = running.generation.Resume(pb.ResumeRequest(request_id="r"))
    running.steps.let_all()
    assert tokens_of([r async for r in first]) == tokens_of([r async for r in second]) == expected(8)


async def test_cancel_ends_the_stream_with_its_reason(running: Running) -> None:
    call = running.generation.Generate(hello(request_id="r"))
    await call.initial_metadata()
    assert (await running.generation.Cancel(pb.CancelRequest(request_id="r"))).cancelled
    responses = [response async for response in call]
    assert [response.finish_reason for response in responses] == [pb.FINISH_REASON_CANCELLED]
    assert not (await running.generation.Cancel(pb.CancelRequest(request_id="r"))).cancelled


async def test_models_lists_what_is_served(running: Running) -> None:
    answer = await running.generation.Models(pb.ModelsRequest())
    assert answer.models == [pb.Model(name="scripted", max_model_len=256, vocab_size=258)]


async def test_a_stream_that_the_service_ends_early_is_unavailable_not_ok(running: Running) -> None:
    call = running.generation.Generate(hello(resumable=True))
    await call.initial_metadata()
    await running.service.stop()
    with pytest.raises(grpc.aio.AioRpcError, match="Resume") as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_two_hundred_streams_at_once_all_complete(running: Running) -> None:
    async def stream(seed: int) -> list[int]:
        request = hello()
        request.sampling.seed = seed
        return tokens_of([response async for response in running.generation.Generate(request)])

    streams = [asyncio.create_task(stream(seed)) for seed in range(200)]
    await until(lambda: len(running.service.requests) == 200)
    running.steps.let(200 * 8)
    assert await asyncio.gather(*streams) == [expected(8, seed) for seed in range(200)]


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json_schema": '{"type": "null"}'}, StructureKind.JSON_SCHEMA, '{"type": "null"}'),
        ({"json_schema": {"enum": ["caf\u00e9"]}}, StructureKind.JSON_SCHEMA, '{"enum": ["caf\\u00e9"]}'),
        ({"json_object": True}, StructureKind.JSON_OBJECT, ""),
        ({"regex": "a+"}, StructureKind.REGEX, "a+"),
        ({"grammar": 'start: "a"'}, StructureKind.GRAMMAR, 'start: "a"'),
    ],
)
async def test_every_kind_of_structure_reaches_the_engine_from_python(
    open_server: Running, given: StructureFields, kind: StructureKind, text: str
) -> None:
    request = generate_request("x", {"structure": given}, request_id="r")
    async for _ in open_server.generation.Generate(request):
        pass
    assert open_server.service.requests["r"].request.sampling.structure == Structure(kind, text)


def test_a_structure_is_exactly_one_thing() -> None:
    two = {"regex": "a", "grammar": "b"}
    for wrong, problem in (({}, "got none"), (two, "got regex, grammar"), ({"x": 1}, "no such")):
        with pytest.raises(InvalidRequest, match=problem):
            generate_request("x", {"structure": wrong})  # type: ignore[typeddict-item]
    with pytest.raises(InvalidRequest, match=r"sampling\.structure\.json_schema"):
        generate_request("x", {"structure": {"json_schema": {"enum": [object()]}}})


async def test_a_server_that_can_keep_to_no_structure_says_so() -> None:
    model = ServedModel("scripted", ByteTokenizer(), max_model_len=256)
    with pytest.raises(InvalidRequest, match="cannot keep output to a structure"):
        await accepted_request(generate_request("x", {"structure": {"json_object": True}}), model)
