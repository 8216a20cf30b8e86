"""Every way that an HTTP server can answer, and each failure by its name. The server's own clock is the reference."""

from __future__ import annotations

import asyncio
import ssl
import time
from itertools import pairwise
from pathlib import Path

import pytest
from certificates import certificates
from hypothesis import given
from hypothesis import strategies as st
from openai_server import DONE, Answer, ScriptedServer, Seen, chat, completion, event, planned, scripted_server, usage

from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.validation import ServedModel
from spotjax.bench import openai
from spotjax.bench.exchange import Exchange
from spotjax.bench.http_endpoint import HttpEndpoint, base_url, tls_context
from spotjax.bench.load import Run, apply_load
from spotjax.bench.sse import MOST_BYTES, EventStream
from spotjax.bench.statistics import answer_times
from spotjax.errors import ConfigError, EndpointFailed
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService

LATE = 0.1
"""Seconds that a busy machine may take to see what was written."""


async def asked(server: ScriptedServer, dialect: openai.Dialect = "completions", count: int = 1, **more: object) -> Run:
    """Asks so many requests at once."""
    options = {"temperature": 0.0, **more}
    async with HttpEndpoint(server.url, dialect, "m", options, api_key="k") as endpoint:
        return await apply_load(endpoint, [planned()] * count, timeout=20)


async def one(answer: Answer, dialect: openai.Dialect = "completions") -> Exchange:
    """What is seen of one answer."""
    async with scripted_server(answer) as server:
        return (await asked(server, dialect)).exchanges[0]


async def failure(*events: bytes, dialect: openai.Dialect = "completions", **how: object) -> tuple[str, str]:
    """Why an answer of these events is not complete."""
    exchange = await one(Answer([(0, data) for data in events], **how), dialect)  # type: ignore[arg-type]
    assert exchange.failure is not None
    return exchange.failure


async def test_times_are_those_at_which_the_server_wrote() -> None:
    steps = [(0.05, completion("a")), (0.03, completion("b")), (0.04, completion("c", "length")), (0.0, usage(9, 3))]
    async with scripted_server(Answer([*steps, (0.0, DONE)])) as server:
        looked: list[float] = []  # at the clock; first when the run begins

        def clock() -> float:
            looked.append(time.perf_counter())
            return looked[-1]

        async with HttpEndpoint(server.url, "completions", "m") as endpoint:
            run = await apply_load(endpoint, [planned()] * 3, clock=clock)
    for exchange, seen in zip(sorted(run.exchanges, key=lambda e: e.sent), server.seen, strict=True):
        assert exchange.failure is None and exchange.text == "abc" and exchange.finish == "length"
        assert (exchange.prompt_tokens, exchange.output_tokens) == (9, 3)
        written = [at - looked[0] for at in seen.written[:3]]
        assert all(0 < at - wrote < LATE for at, wrote in zip(exchange.times, written, strict=True))
        times = answer_times(exchange)
        assert 0.05 <= times.ttft < 0.05 + LATE and 0.12 <= times.e2el < 0.12 + 2 * LATE
        assert times.tpot == pytest.approx((times.e2el - times.ttft) / 2)


async def test_a_completion_asks_for_what_was_planned_and_shows_the_key() -> None:
    async with scripted_server(Answer([(0, completion("a", "stop")), (0, DONE)])) as server:
        await asked(server, ignore_eos=True, top_k=4)
    (seen,) = server.seen
    assert seen.path == "/v1/completions" and seen.headers["authorization"] == "Bearer k"
    assert seen.body == {
        "model": "m", "prompt": "the way", "max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "top_k": 4,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_a_chat_asks_as_a_user_and_the_event_that_only_says_who_speaks_is_no_token() -> None:
    who, first = (0.0, chat(role="assistant", content="")), (0.04, chat(content="a"))
    events = [who, first, (0, chat(reasoning_content="b")), (0, chat("stop")), (0, usage(3, 2)), (0, DONE)]
    async with scripted_server(Answer(events)) as server:
        (exchange,) = (await asked(server, "chat", temperature=0.5)).exchanges
    assert exchange.failure is None and exchange.text == "ab" and len(exchange.times) == 3
    assert exchange.times[0] - exchange.sent >= 0.04
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions" and seen.body["messages"] == [{"role": "user", "content": "the way"}]
    assert seen.body["max_completion_tokens"] == 4 and seen.body["seed"] == 0


async def test_several_tokens_may_come_in_one_piece_and_usage_may_come_with_the_last() -> None:
    last = event(
        choices=[{"text": "d e", "finish_reason": "length"}], usage={"prompt_tokens": 2, "completion_tokens": 5}
    )
    exchange = await one(Answer([(0, completion("a b c")), (0.01, last), (0, DONE)]))
    assert exchange.failure is None and len(exchange.times) == 2 and exchange.output_tokens == 5


async def test_a_server_may_leave_out_usage_the_end_mark_and_the_last_empty_line() -> None:
    exchange = await one(Answer([(0, completion("a")), (0, completion("b", "length").rstrip())]))
    assert exchange.failure is None and exchange.text == "ab" and exchange.output_tokens is None


async def test_empty_pieces_are_tokens_whose_text_is_not_complete() -> None:
    exchange = await one(Answer([(0, completion("")), (0.01, completion("\N{SNOWMAN}")), (0, DONE)]))
    assert exchange.failure is None and len(exchange.times) == 2


async def test_what_a_server_says_instead_of_an_answer_is_counted_by_its_status() -> None:
    said = b'{"error": {"message": "too many requests", "type": "rate"}}'
    assert await failure(said, status=429, kind="application/json") == ("http 429", "too many requests")
    assert await failure(b"<html>" + b"x" * 9999, status=500, kind="text/html") == (
        "http 500",
        ("<html>" + "x" * 9999)[:300],
    )


async def test_what_is_no_stream_of_events_is_said_to_be_none() -> None:
    whole = b'{"choices": [{"text": "all at once"}]}'
    assert (await failure(whole, kind="application/json"))[0] == "not a stream"
    assert (await failure(b"data: {not json}\n\n"))[0] == "garbage"
    assert (await failure(b"\xff\xfe\n\n", completion("a"), b'data: "\xff"\n\n'))[0] == "garbage"
    assert (await failure(b'data: {"choices": 5}\n\n'))[0] == "garbage"
    assert (await failure(DONE))[0] == "no tokens"
    assert await failure(event(error={"message": "out of memory"})) == ("error in stream", "out of memory")


async def test_a_stream_that_breaks_has_failed_however_much_of_it_there_was() -> None:
    assert (await failure(completion("a"), completion("b")))[0] == "broken stream"
    assert (await failure(completion("a"), whole=False))[0] == "broken connection"
    assert (await failure(completion("a", "abort"), DONE))[0] == "ended early"


async def test_no_server_is_a_refused_connection() -> None:
    async with scripted_server(Answer([])) as server:
        pass
    (exchange,) = (await asked(server)).exchanges
    assert exchange.failure is not None and exchange.failure.kind == "connection refused"


async def test_a_call_of_a_tool_is_output() -> None:
    calls = [chat(role="assistant", tool_calls=[{"index": 0}]), chat(tool_calls=[{"index": 0}]), chat("tool_calls")]
    exchange = await one(Answer([(0, data) for data in [chat(role="assistant", tool_calls=[]), *calls, DONE]]), "chat")
    assert exchange.failure is None and len(exchange.times) == 3


async def test_token_ids_are_no_chat() -> None:
    with pytest.raises(EndpointFailed, match="token ids"):
        openai.body("chat", "m", planned(prompt=(1, 2)), {})
    assert openai.body("completions", "m", planned(prompt=(1, 2)), {})["prompt"] == (1, 2)


async def test_the_model_is_the_first_that_the_server_lists() -> None:
    def answer(seen: Seen) -> Answer:
        assert seen.path == "/v1/models" and seen.headers["authorization"] == "Bearer k"
        return Answer([(0, b'{"data": [{"id": "a", "object": "model"}, {"id": "b"}]}')], kind="application/json")

    async with scripted_server(answer) as server, HttpEndpoint(server.url, "chat", api_key="k") as endpoint:
        assert await endpoint.find_model() == "a"
    for said, status in ((b'{"data": []}', 200), (b"[]", 200), (b"{}", 401)):
        async with scripted_server(Answer([(0, said)], status)) as server, HttpEndpoint(server.url, "chat") as endpoint:
            with pytest.raises(EndpointFailed):
                await endpoint.find_model()


async def test_a_hundred_streams_at_once_are_all_read_while_they_are_written() -> None:
    events = [(0.02, completion("x"))] * 10
    async with scripted_server(Answer([*events, (0, usage(1, 10)), (0, DONE)])) as server:
        run = await asked(server, count=100)
    assert all(exchange.failure is None and len(exchange.times) == 10 for exchange in run.exchanges)
    assert len({seen.read for seen in server.seen}) == 100


async def test_a_server_with_tls_is_asked_once_its_authority_is_known_and_both_show_who_they_are(
    tmp_path: Path,
) -> None:
    files = certificates(tmp_path)
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.authority)
    theirs.load_cert_chain(files.certificate, files.key)
    theirs.verify_mode = ssl.CERT_REQUIRED
    async with scripted_server(Answer([(0, completion("a", "stop")), (0, DONE)]), theirs) as server:
        for ours in (files, (None, None, files.authority), (None, None, None)):
            async with HttpEndpoint(server.url, "completions", "m", tls=tls_context(*ours)) as endpoint:
                (exchange,) = (await apply_load(endpoint, [planned()], timeout=20)).exchanges
            assert (exchange.failure is None) is (ours is files)
            assert exchange.failure is None or "connection" in exchange.failure.kind


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_our_own_server_over_http_is_measured_like_any_other(api: openai.Dialect) -> None:
    backend, service = Backend(), ScriptedService(delay=lambda: asyncio.sleep(0.01))
    backend.attach(service, ServedModel("scripted", ByteTokenizer(), max_model_len=512))
    server = HttpServer(application(backend))
    url = f"http://127.0.0.1:{await server.start('127.0.0.1:0')}"
    async with HttpEndpoint(url, api, options={"temperature": 0.5, "ignore_eos": True}) as endpoint:
        assert await endpoint.find_model() == "scripted"
        run = await apply_load(endpoint, [planned(output=5)] * 3, timeout=20)
    await service.stop()
    await server.stop()
    for exchange in run.exchanges:
        assert exchange.failure is None and exchange.output_tokens == 5 and exchange.finish == "length"
        assert len(exchange.text) == 5 and 1 < len(exchange.times) <= 6
        assert exchange.prompt_tokens is not None and exchange.prompt_tokens > len("the way")


@pytest.mark.parametrize("url", ["127.0.0.1:8471", "ftp://x", "http://", "http://x/v1?a=b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a URL"):
        base_url(url)


def test_a_path_that_is_given_is_kept() -> None:
    assert base_url("http://x:1/") == "http://x:1/v1" and base_url("https://x/api/v1/") == "https://x/api/v1"


def test_tls_that_makes_no_sense_is_refused(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="go together"):
        tls_context("a.pem", None, None)
    with pytest.raises(ConfigError, match="TLS"):
        tls_context(None, None, f"{tmp_path}/none.pem")
    assert tls_context(None, None, None) is None
    with pytest.raises(ConfigError, match="https"):
        HttpEndpoint("http://x", "chat", tls=ssl.create_default_context())


LINES = st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\n")), max_size=6)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.sampled_from([": ping", "event: x", "id: 7"]), st.data())
def test_events_are_the_same_wherever_the_network_cuts_them(
    texts: list[str], end: str, noise: str, data: st.DataObject
) -> None:
    wire = "".join(f"{noise}{end}data: {text}{end}{end}" for text in texts).encode()
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=10))
    stream, places = EventStream(), sorted({0, len(wire), *cuts})
    found = [event for a, b in pairwise(places) for event in stream.feed(wire[a:b])]
    assert [*found, *stream.end()] == [text.encode() for text in texts]


def test_an_event_of_several_lines_is_joined_and_one_without_end_is_refused() -> None:
    assert EventStream().feed(b"data: a\nid: 3\ndata: b\n\n: only a comment\n\n") == [b"a\nb"]
    with pytest.raises(ValueError, match="without the end"):
        EventStream().feed(b"data: " + b"x" * MOST_BYTES)


async def test_cancelling_ends_the_requests_of_the_server_too() -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + completion("a"))
        begun.set()
        await reader.read(1 << 16)
        if not await reader.read():
            closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, HttpEndpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "chat", "m") as endpoint:
        task = asyncio.create_task(apply_load(endpoint, [planned()]))
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        run = await task
        assert run.interrupted
        await asyncio.wait_for(closed.wait(), 10)
        server.close()
