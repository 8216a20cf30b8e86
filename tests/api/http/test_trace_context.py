"""A caller's W3C trace context comes along with the request, over gRPC and over HTTP; what is none is dropped."""

import pytest
from http_cases import Web
from scripted_server import Running

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CASES = [((CALLER,), CALLER), ((), ""), (("garbage",), "")]


@pytest.mark.parametrize(("headers", "kept"), CASES)
async def test_grpc(open_server: Running, headers: tuple[str, ...], kept: str) -> None:
    request = pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=2), request_id="mine")
    metadata = [("traceparent", value) for value in headers]
    async for _ in open_server.generation.Generate(request, metadata=metadata):
        pass
    assert open_server.service.accepted("mine").traceparent == kept


@pytest.mark.parametrize(("headers", "kept"), [*CASES, ((CALLER, CALLER), "")])
async def test_http(open_web: Web, headers: tuple[str, ...], kept: str) -> None:
    sent = [("traceparent", value) for value in headers]
    answer = await open_web.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=sent)
    assert answer.status_code == 200, answer.text
    (name,) = open_web.service.requests
    assert open_web.service.accepted(name).traceparent == kept


async def test_the_next_call_on_a_connection_is_not_part_of_the_trace_before(open_web: Web) -> None:
    for headers in ({"traceparent": CALLER}, {}):
        await open_web.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}, headers=headers)
    found = [open_web.service.accepted(name).traceparent for name in open_web.service.requests]
    assert found == [CALLER, ""]
