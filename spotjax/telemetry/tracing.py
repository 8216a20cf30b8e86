"""Spans of requests and of migrations, by OpenTelemetry. Never a prompt, a token or a text; the extra ``otel`` has it.

A request is a span with three parts for each of its sequences: ``queued``, ``prefill`` (until its first token) and
``decode``. A migration is a span with its phases as parts, linked to the requests that it paused. Spans are made of
times that were noted anyway, when a request or a migration is over, so tracing costs nothing while tokens are made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from spotjax import __version__
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState
from spotjax.errors import ConfigError
from spotjax.fleet.observer import STOPPED, Migration
from spotjax.telemetry.recorder import Times
from spotjax.telemetry.trace_context import HEADER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

EXPORT_SECONDS = 5.0
"""For one attempt to hand spans over."""
FLUSH_SECONDS = 2.0
"""For those that are left when the server ends."""


class SpanExport(NamedTuple):
    """What takes spans, and what hands them over in the background."""

    provider: TracerProvider
    exporter: SpanExporter

    async def close(self) -> None:
        """Hands over what is left, as far as that can be done in short time."""
        ending = asyncio.create_task(asyncio.to_thread(self.provider.shutdown))
        await asyncio.wait({ending}, timeout=FLUSH_SECONDS)
        if not ending.done():
            await asyncio.to_thread(self.exporter.shutdown)
        await ending


def open_export(endpoint: str) -> SpanExport:
    """Hands spans over to an OTLP endpoint by gRPC.

    Args:
      endpoint: ``http://HOST:PORT``, or ``https://`` with TLS.

    Raises:
      ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as problem:
        raise ConfigError(
            f"traces ({endpoint}) needs OpenTelemetry, which is not installed: pip install 'spotjax[otel]'"
        ) from problem
    resource = Resource.create({"service.name": "spotjax", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return SpanExport(provider, exporter)


class Tracing:
    """Makes spans. See ``recorder.Traces``.

    Args:
      provider: takes them.
      clock: monotonic seconds, on which all times are that it is told.
      wall_clock: Unix time in nanoseconds.
    """

    def __init__(
        self,
        provider: TracerProvider,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._provider, self._clock, self._wall_clock = provider, clock, wall_clock
        self._tracer = provider.get_tracer("spotjax", __version__)
        self._requests: dict[str, tuple[Span, float]] = {}
        """Span and arrival of those that have not ended."""

    def arrived(self, request: GenerationRequest, now: float) -> None:
        """See ``Traces.arrived``."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller = TraceContextTextMapPropagator().extract({HEADER: request.traceparent})
        span = self._tracer.start_span(
            "request",
            caller,
            SpanKind.SERVER,
            {
                "spotjax.request_id": request.request_id,
                "gen_ai.usage.input_tokens": len(request.prompt),
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
                "gen_ai.request.choice.count": request.n,
            },
            start_time=self._wall(now),
        )
        self._requests[request.request_id] = span, now

    def withdrawn(self, request_id: str) -> None:
        """See ``Traces.withdrawn``."""
        if (traced := self._requests.pop(request_id, None)) is not None:
            traced[0].add_event("not recorded")
            traced[0].end()

    def ended(self, state: RequestState, times: Times, now: float, last: bool) -> None:
        """See ``Traces.ended``. Of requests of an earlier process there is no span."""
        from opentelemetry.trace import set_span_in_context

        if (traced := self._requests.get(state.request_id)) is None:
            return
        span, arrived = traced
        within = set_span_in_context(span)
        ends = [("queued", times.begun), ("prefill", times.first), ("decode", now)]
        begin = arrived
        for name, end in ends:
            end = now if end is None else end
            part = self._tracer.start_span(
                name, within, attributes={"spotjax.choice": state.choice}, start_time=self._wall(begin)
            )
            if name == "decode":
                part.set_attribute("gen_ai.usage.output_tokens", len(state.tokens))
                part.set_attribute("gen_ai.response.finish_reasons", [str(state.finish)])
            part.end(self._wall(end))
            if end == now:
                break
            begin = end
        if last:
            span.end(self._wall(now))
            del self._requests[state.request_id]

    def migrated(self, migration: Migration) -> None:
        """See ``Traces.migrated``."""
        from opentelemetry.trace import Link, set_span_in_context

        paused = {
            one.request_id: self._requests[one.request_id][0]
            for one in migration.paused
            if one.request_id in self._requests
        }
        span = self._tracer.start_span(
            "migration",
            links=[Link(request.get_span_context()) for request in paused.values()],
            attributes={
                "spotjax.epoch": migration.epoch,
                "spotjax.path": migration.path,
                "spotjax.outcome": migration.outcome,
                "spotjax.pause_seconds": migration.pause_seconds,
                **{f"spotjax.bytes.{name}": size for name, size in migration.bytes._asdict().items()},
            },
            start_time=self._wall(migration.began),
        )
        begin, stopped, within = migration.began, migration.began, set_span_in_context(span)
        for phase, end in migration.phases:
            part = self._tracer.start_span(phase, within, start_time=self._wall(begin))
            part.end(self._wall(end))
            begin, stopped = end, stopped if phase in STOPPED else end
        span.end(self._wall(migration.ended))
        for one in migration.paused:
            if one.request_id in paused:
                about = {"spotjax.epoch": migration.epoch, "spotjax.choice": one.choice}
                request = paused[one.request_id]
                request.add_event("preempted", about, self._wall(stopped))
                kept = about | {"spotjax.positions": one.computed, "spotjax.positions_kept": one.kept}
                request.add_event("resumed", kept, self._wall(migration.ended))

    def _wall(self, then: float) -> int:
        """Unix time in nanoseconds of a moment on the clock."""
        return self._wall_clock() - int((self._clock() - then) * 1e9)
