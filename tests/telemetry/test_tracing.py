"""Spans: of a request with its parts, of a migration linked to what it paused; in memory, and over OTLP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.errors import ConfigError
from spotjax.fleet.observer import Bytes, Migration, Paused
from spotjax.telemetry.recorder import Recorder
from spotjax.telemetry.server_telemetry import ServerTelemetry
from spotjax.telemetry.trace_context import checked_traceparent
from spotjax.telemetry.tracing import EXPORT_SECONDS, Tracing

PROMPT = tuple(b"a secret prompt")
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-2] + "00"
WALL = 1_700_000_000_000_000_000


class Traced:
    """A recorder whose spans are kept; its clock stands still at ``now``."""

    def __init__(self, now: float = 100.0) -> None:
        self._exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._now = now
        self.recorder = Recorder(Tracing(provider, lambda: now, lambda: WALL))

    def spans(self) -> dict[str, ReadableSpan]:
        finished = self._exporter.get_finished_spans()
        assert len({span.name for span in finished}) == len(finished), "names are unique in these tests"
        return {span.name: span for span in finished}

    def times(self, name: str) -> tuple[float, float]:
        """Begin and end of a span on the recorder's clock."""
        span = self.spans()[name]
        assert span.start_time is not None and span.end_time is not None
        begin, end = [round(self._now + (at - WALL) / 1e9, 6) for at in (span.start_time, span.end_time)]
        return begin, end


def request(traceparent: str = "", n: int = 1) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(max_tokens=3), n, traceparent=traceparent)


def state(tokens: int, finish: FinishReason | None = None) -> RequestState:
    return RequestState(
        "r", 0, PROMPT, SamplingParams(max_tokens=3), tokens=(115,) * tokens, text="s" * tokens, finish=finish
    )


def live_through(recorder: Recorder, traceparent: str = "") -> None:
    recorder.arrived(request(traceparent), 10.0)
    recorder.begun(state(0), 11.0)
    recorder.committed([state(1)], 13.0)
    recorder.committed([state(2)], 14.0)
    recorder.committed([state(3, FinishReason.LENGTH)], 16.5)


def context(span: ReadableSpan) -> SpanContext:
    found = span.get_span_context()
    assert found is not None
    return found


def test_a_request_is_a_span_with_its_parts() -> None:
    traced = Traced()
    live_through(traced.recorder)
    spans = traced.spans()
    assert {name: traced.times(name) for name in spans} == {
        "queued": (10.0, 11.0), "prefill": (11.0, 13.0), "decode": (13.0, 16.5), "request": (10.0, 16.5)
    }  # fmt: skip
    for name in ("queued", "prefill", "decode"):
        parent = spans[name].parent
        assert parent is not None and parent.span_id == context(spans["request"]).span_id
    about = spans["request"].attributes or {}
    assert (about["spotjax.request_id"], about["gen_ai.usage.input_tokens"]) == ("r", len(PROMPT))
    decoded = spans["decode"].attributes or {}
    assert (decoded["gen_ai.usage.output_tokens"], decoded["gen_ai.response.finish_reasons"]) == (3, ("length",))


def test_no_span_has_anything_of_prompt_or_output() -> None:
    traced = Traced()
    live_through(traced.recorder)
    told = "".join(span.to_json() for span in traced.spans().values())
    assert "secret" not in told and "sss" not in told and str(list(PROMPT))[1:-1] not in told


def test_one_that_ends_in_the_queue_has_no_other_part() -> None:
    traced = Traced()
    traced.recorder.arrived(request(), 10.0)
    traced.recorder.committed([state(0, FinishReason.CANCELLED)], 12.0)
    assert traced.spans().keys() == {"queued", "request"}
    assert traced.times("queued") == (10.0, 12.0)


def test_a_request_continues_its_caller_s_trace() -> None:
    traced = Traced()
    live_through(traced.recorder, CALLER)
    root = traced.spans()["request"]
    assert f"{context(root).trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert root.parent is not None and f"{root.parent.span_id:016x}" == "b7ad6b7169203331"


def test_a_caller_who_does_not_sample_is_not_sampled() -> None:
    traced = Traced()
    live_through(traced.recorder, UNSAMPLED)
    assert not traced.spans()


@pytest.mark.parametrize(
    "header",
    ["", "x", CALLER.upper(), f"ff{CALLER[2:]}", f"00-{'0' * 32}-b7ad6b7169203331-01", f"{CALLER[:36]}{'0' * 16}-01",
     CALLER + "-more", f" {CALLER}", f"{CALLER}\n"],
)  # fmt: skip
def test_a_header_that_is_no_trace_context_counts_as_none(header: str) -> None:
    assert checked_traceparent(CALLER) == CALLER
    assert checked_traceparent(header) == ""


def test_a_migration_is_a_span_with_its_phases_linked_to_the_requests_that_it_paused() -> None:
    traced = Traced()
    traced.recorder.arrived(request(), 10.0)
    traced.recorder.begun(state(0), 11.0)
    phases = (("plan", 21.0), ("prepare", 22.0), ("precopy", 23.0), ("wait", 24.0), ("stop", 25.0), ("final", 26.0),
              ("switch", 27.0))  # fmt: skip
    paused = (Paused("r", 0, 20, 16), Paused("of an earlier process", 0, 3, 3))
    traced.recorder.migrated(Migration("planned", "switched", 4, 20.0, phases, Bytes(1, 2, 3, 4), 3.0, paused))
    traced.recorder.committed([state(3, FinishReason.LENGTH)], 30.0)
    spans, migration = traced.spans(), traced.spans()["migration"]
    assert traced.times("migration") == (20.0, 27.0)
    assert [traced.times(name) for name, _ in phases] == [(end - 1, end) for _, end in phases]
    about = migration.attributes or {}
    assert {name.removeprefix("spotjax."): value for name, value in about.items()} == {
        "epoch": 4, "path": "planned", "outcome": "switched", "pause_seconds": 3.0, "bytes.parameters_moved": 1,
        "bytes.parameters_loaded": 2, "bytes.kv_precopied": 3, "bytes.kv_moved": 4,
    }  # fmt: skip
    assert [link.context.span_id for link in migration.links] == [context(spans["request"]).span_id]
    preempted, resumed = spans["request"].events
    assert (preempted.name, resumed.name) == ("preempted", "resumed")
    assert (preempted.timestamp - WALL, resumed.timestamp - WALL) == (-76 * 10**9, -73 * 10**9)
    assert dict(resumed.attributes or {}) == {
        "spotjax.epoch": 4, "spotjax.choice": 0, "spotjax.positions": 20, "spotjax.positions_kept": 16
    }  # fmt: skip


def test_nothing_is_kept_of_requests_that_ended_or_were_refused() -> None:
    traced = Traced()
    live_through(traced.recorder)
    traced.recorder.arrived(request(), 20.0)
    traced.recorder.withdrawn("r")
    traces = traced.recorder._traces
    assert isinstance(traces, Tracing) and not traces._requests and not traced.recorder._followed


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """What an OpenTelemetry collector is to a server."""

    def __init__(self) -> None:
        self.spans: list[str] = []
        self.services: set[str] = set()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_arrive_at_an_otlp_endpoint_before_the_server_ends() -> None:
    receiver, server = Receiver(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    telemetry = ServerTelemetry(lambda: None, f"http://127.0.0.1:{port}")
    live_through(telemetry.recorder)
    await telemetry.close()
    server.stop(None).wait()
    assert sorted(receiver.spans) == ["decode", "prefill", "queued", "request"]
    assert receiver.services == {"spotjax"}


async def test_an_endpoint_that_does_not_answer_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotjax.telemetry.tracing.FLUSH_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        telemetry = ServerTelemetry(lambda: None, f"http://127.0.0.1:{silent.getsockname()[1]}")
        live_through(telemetry.recorder)
        began = time.monotonic()
        await telemetry.close()
        assert time.monotonic() - began < EXPORT_SECONDS


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"traces \(http://x:1\) needs OpenTelemetry.*pip install 'spotjax\[otel\]'"):
        ServerTelemetry(lambda: None, "http://x:1")


def test_metrics_alone_load_nothing_of_opentelemetry() -> None:
    program = "import sys, spotjax.telemetry.server_telemetry; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
