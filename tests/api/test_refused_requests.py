"""Whatever a server does not take is refused by name, with the range that it would take."""

import re

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_server import MODEL, Running

from spotjax.api.prompt import prompt_tokens
from spotjax.api.proto.spotjax.v1 import fleet_pb2, generation_pb2
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.unknown_fields import unknown_fields
from spotjax.api.validation import accepted_request
from spotjax.errors import InvalidRequest


async def refusal(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Code, message and trailing metadata of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    error = failure.value
    return error.code(), error.details() or "", {str(k): str(v) for k, v in error.trailing_metadata()}


def text(**sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", sampling=pb.Sampling(**sampling))


def chat(role: int, content: str = "hi") -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content)]))


INVALID = [
    (pb.GenerateRequest(), "input", "text, chat and token_ids"),
    (pb.GenerateRequest(text=""), "text", "not be empty"),
    (pb.GenerateRequest(chat=pb.ChatMessages()), "chat.messages", "at least one"),
    (chat(pb.ChatMessage.ROLE_UNSPECIFIED), "chat.messages[0].role", "ROLE_USER"),
    (chat(17), "chat.messages[0].role", "got 17"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids", "at least one"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3, 258])), "token_ids.ids", "[0, 257], got 258"),
    (pb.GenerateRequest(text="x" * 300), "text", "at most 255 tokens (max_model_len 256), got 301"),
    (chat(pb.ChatMessage.ROLE_USER, "x" * 300), "chat", "at most 255 tokens"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 256)), "token_ids", "at most 255 tokens"),
    (pb.GenerateRequest(text="x", model="gpt"), "model", "'scripted'"),
    (pb.GenerateRequest(text="x", model=""), "model", "'scripted'"),
    (pb.GenerateRequest(text="x", n=0), "n", "[1, 16]"),
    (pb.GenerateRequest(text="x", n=17), "n", "[1, 16]"),
    (pb.GenerateRequest(text="x", request_id=""), "request_id", "1 to 64"),
    (pb.GenerateRequest(text="x", request_id="a b"), "request_id", "1 to 64"),
    (pb.GenerateRequest(text="x", request_id="a\n"), "request_id", "1 to 64"),
    (pb.GenerateRequest(text="x", request_id="a" * 65), "request_id", "1 to 64"),
    (text(max_tokens=0), "sampling.max_tokens", "at least 1"),
    (text(max_tokens=255), "sampling.max_tokens", "[1, 254]"),
    (text(temperature=-0.1), "sampling.temperature", "[0, 100]"),
    (text(temperature=float("nan")), "sampling.temperature", "[0, 100]"),
    (text(temperature=float("inf")), "sampling.temperature", "[0, 100]"),
    (text(top_p=0), "sampling.top_p", "(0, 1]"),
    (text(top_p=1.1), "sampling.top_p", "(0, 1]"),
    (text(min_p=-0.1), "sampling.min_p", "[0, 1]"),
    (text(min_p=1.1), "sampling.min_p", "[0, 1]"),
    (text(repetition_penalty=0), "sampling.repetition_penalty", "(0, 10]"),
    (text(repetition_penalty=11), "sampling.repetition_penalty", "(0, 10]"),
    (text(presence_penalty=2.1), "sampling.presence_penalty", "[-2, 2]"),
    (text(frequency_penalty=-2.1), "sampling.frequency_penalty", "[-2, 2]"),
    (text(logit_bias={258: 0.0}), "sampling.logit_bias", "[0, 257]"),
    (text(logit_bias={1: 101.0}), "sampling.logit_bias", "[-100, 100]"),
    (text(logit_bias={1: float("nan")}), "sampling.logit_bias", "[-100, 100]"),
    (text(logprobs=21), "sampling.logprobs", "[0, 20]"),
    (text(stop=[""]), "sampling.stop", "none empty"),
    (text(stop=["a"] * 17), "sampling.stop", "at most 16"),
    (text(stop_token_ids=[258]), "sampling.stop_token_ids", "[0, 257]"),
    (text(structure=pb.Structure()), "sampling.structure", "json_schema, json_object, regex, grammar must be set"),
    (text(structure=pb.Structure(json_object=False)), "sampling.structure.json_object", "must be true"),
    (text(structure=pb.Structure(regex="no")), "sampling.structure.regex", "as scripted: 'no'"),
    (text(structure=pb.Structure(json_schema="no")), "sampling.structure.json_schema", "as scripted: 'no'"),
]


@pytest.mark.parametrize(("request_", "field", "accepted"), INVALID, ids=[f"{f}-{a}" for _, f, a in INVALID])
async def test_an_invalid_field_is_refused_by_name_with_what_is_accepted(
    open_server: Running, request_: pb.GenerateRequest, field: str, accepted: str
) -> None:
    code, message, metadata = await refusal(open_server.generation.Generate(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(f"{field}: ") and accepted in message
    assert metadata["spotjax-field"] == field
    assert not open_server.service.requests


def test_every_field_of_a_request_that_has_a_range_is_in_the_list() -> None:
    named = {re.split(r"[\[.]", field.removeprefix("sampling."))[0] for _, field, _ in INVALID}
    fields = {*pb.GenerateRequest.DESCRIPTOR.fields_by_name, *pb.Sampling.DESCRIPTOR.fields_by_name}
    assert fields - named == {"sampling", "resumable", "ignore_eos", "seed", "top_k"}


def with_unknown(message: pb.GenerateRequest, inner: bytes = b"") -> pb.GenerateRequest:
    """The message with field 99 (a varint), as a newer client would send it."""
    return type(message).FromString(message.SerializeToString() + (inner or b"\x98\x06\x01"))


NEWER = [
    (with_unknown(pb.GenerateRequest(text="x")), "99"),
    (with_unknown(pb.GenerateRequest(text="x"), b"\x32\x03\x98\x06\x01"), "sampling.99"),
    (with_unknown(pb.GenerateRequest(), b"\x22\x05\x0a\x03\x98\x06\x01"), "chat.messages[0].99"),
    (with_unknown(pb.GenerateRequest(), b"\x2a\x03\x98\x06\x01"), "token_ids.99"),
]


@pytest.mark.parametrize(("request_", "path"), NEWER)
async def test_an_unknown_field_is_refused_wherever_it_is(
    open_server: Running, request_: pb.GenerateRequest, path: str
) -> None:
    code, message, metadata = await refusal(open_server.generation.Generate(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "unknown field" in message and metadata["spotjax-field"] == path


@pytest.mark.parametrize("module", [generation_pb2, fleet_pb2])
async def test_every_method_refuses_unknown_fields(running: Running, module: object) -> None:
    stubs = {"Generation": running.generation, "Fleet": running.fleet}
    for service in module.DESCRIPTOR.services_by_name.values():  # type: ignore[attr-defined]
        for method in service.methods:
            request = with_unknown(getattr(module, method.input_type.name)())
            code, message, _ = await refusal(getattr(stubs[service.name], method.name)(request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "unknown field" in message, method.full_name


async def test_a_request_id_that_is_taken_is_refused(open_server: Running) -> None:
    request = pb.GenerateRequest(text="x", request_id="r")
    async for _ in open_server.generation.Generate(request):
        pass
    code, _, metadata = await refusal(open_server.generation.Generate(request))
    assert (code, metadata["spotjax-field"]) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")


@pytest.mark.parametrize("offsets", [[9], [0, 1], [0, 0, 0]])
async def test_offsets_beyond_the_output_are_refused(open_server: Running, offsets: list[int]) -> None:
    request = pb.GenerateRequest(text="x", request_id="r", sampling=pb.Sampling(max_tokens=8))
    async for _ in open_server.generation.Generate(request):
        pass
    request = pb.ResumeRequest(request_id="r", offsets=offsets)
    code, _, metadata = await refusal(open_server.generation.Resume(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and metadata["spotjax-field"].startswith("offsets")


@pytest.mark.parametrize("method", ["Resume", "Cancel"])
async def test_unknown_requests_are_not_found_and_bad_ids_invalid(running: Running, method: str) -> None:
    kind = {"Resume": pb.ResumeRequest, "Cancel": pb.CancelRequest}[method]
    call = getattr(running.generation, method)
    assert (await refusal(call(kind(request_id="nobody"))))[0] is grpc.StatusCode.NOT_FOUND
    assert (await refusal(call(kind(request_id="no body"))))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refusal(call(kind())))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_full_queue_says_when_to_try_again(running: Running) -> None:
    running.service.overloaded = True
    code, _, metadata = await refusal(running.generation.Generate(text()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert float(metadata["retry-after-seconds"]) == 1.5


async def test_a_draining_server_is_unavailable(running: Running) -> None:
    await running.service.drain(0)
    code, message, _ = await refusal(running.generation.Generate(text()))
    assert code is grpc.StatusCode.UNAVAILABLE and "draining" in message


async def test_a_message_beyond_the_limit_is_refused_before_it_is_read(running: Running) -> None:
    code, _, _ = await refusal(running.generation.Generate(pb.GenerateRequest(text="x" * 5_000_000)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bug_in_the_service_is_internal_and_tells_the_client_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(running.service, "status", broken)
    code, message, _ = await refusal(running.fleet.Status(fleet_pb2.StatusRequest()))
    assert code is grpc.StatusCode.INTERNAL and "secret" not in message
    assert "secret" in caplog.text


def sampling_messages() -> st.SearchStrategy[pb.Sampling]:
    number = st.floats() | st.sampled_from([0.0, 0.5, 1.0])
    count = st.integers(0, 300) | st.integers(0, 2**32 - 1)
    fields = {
        "max_tokens": count,
        "temperature": number,
        "top_k": count,
        "top_p": number,
        "min_p": number,
        "seed": st.integers(0, 2**64 - 1),
        "repetition_penalty": number,
        "presence_penalty": number,
        "frequency_penalty": number,
        "logit_bias": st.dictionaries(count, number, max_size=3),
        "logprobs": st.integers(0, 25),
        "stop": st.lists(st.text(max_size=3), max_size=18),
        "stop_token_ids": st.lists(count, max_size=3),
        "ignore_eos": st.booleans(),
        "structure": st.builds(pb.Structure)
        | st.builds(pb.Structure, json_object=st.booleans())
        | st.builds(pb.Structure, regex=st.sampled_from(["a+", "no"])),
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: pb.Sampling(**given))


def messages() -> st.SearchStrategy[pb.GenerateRequest]:
    turn = st.builds(pb.ChatMessage, role=st.integers(0, 5), content=st.text(max_size=5))
    fields = {
        "request_id": st.text(max_size=66),
        "model": st.sampled_from(["", "scripted", "other"]),
        "n": st.integers(0, 20),
        "resumable": st.booleans(),
        "sampling": sampling_messages(),
    }
    inputs = st.one_of(
        st.just({}),
        st.fixed_dictionaries({"text": st.text(max_size=300)}),
        st.fixed_dictionaries({"chat": st.builds(pb.ChatMessages, messages=st.lists(turn, max_size=3))}),
        st.fixed_dictionaries({"token_ids": st.builds(pb.TokenIds, ids=st.lists(st.integers(0, 300), max_size=300))}),
    )
    known = st.builds(lambda a, b: pb.GenerateRequest(**a, **b), st.fixed_dictionaries({}, optional=fields), inputs)
    return known | known.map(with_unknown)


def is_real_field(path: str) -> bool:
    """Whether a path names a field of GenerateRequest, its oneof, or an unknown number somewhere in it."""
    descriptor = pb.GenerateRequest.DESCRIPTOR
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        if name == "input" or name.isdecimal():
            return True
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        descriptor = descriptor.fields_by_name[name].message_type
    return True


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_=messages())
async def test_any_request_gives_tokens_or_the_name_of_a_real_field(
    open_server: Running, request_: pb.GenerateRequest
) -> None:
    open_server.service.requests.clear()
    try:
        responses = [response async for response in open_server.generation.Generate(request_)]
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
        metadata = {str(k): str(v) for k, v in error.trailing_metadata()}
        assert is_real_field(metadata["spotjax-field"]), metadata
        assert not open_server.service.requests
    else:
        choices = request_.n if request_.HasField("n") else 1
        assert sum(1 for response in responses if response.finish_reason) == choices
        assert sum(len(response.token_ids) for response in responses) >= choices


@given(request_=messages())
async def test_an_accepted_request_is_within_every_range(request_: pb.GenerateRequest) -> None:
    try:
        accepted = await accepted_request(request_, MODEL)
    except InvalidRequest:
        return
    assert accepted.prompt == await prompt_tokens(request_, MODEL.tokenizer)
    assert len(accepted.prompt) + accepted.sampling.max_tokens <= MODEL.max_model_len
    assert 1 <= accepted.n <= 16 and max(accepted.prompt) < MODEL.tokenizer.vocab_size
    assert accepted.resumable == request_.resumable
    for name in ("temperature", "top_p", "seed", "logprobs", "max_tokens"):
        if request_.sampling.HasField(name):
            assert getattr(accepted.sampling, name) == getattr(request_.sampling, name)


def test_messages_that_are_known_have_no_unknown_fields() -> None:
    request = text(logit_bias={1: 1.0}, stop=["a"], stop_token_ids=[1])
    request.chat.messages.add(role=pb.ChatMessage.ROLE_USER, content="x")
    assert list(unknown_fields(request)) == []
