"""The blocking Python client of a Spotjax server. ``spotjax.async_client`` has the same for asyncio.

    with SpotjaxClient("127.0.0.1:8470") as client:
        for delta in client.generate("Once upon a time", max_tokens=64):
            print(delta.text, end="")

A resumable request (the default) outlives its connection: when that breaks, the client connects again and takes the
stream up where it stopped, so the caller sees each token exactly once. Closing ``generate`` early ends its request.

Methods raise the errors of ``spotjax.errors`` as the server raised them, ``Unavailable`` when no server answers, and
``TimeoutError`` when ``timeout`` seconds were not enough.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spotjax.api.calls import CANCEL_TIMEOUT, DEFAULT_SERVER, OPTIONS, deadline_after, names_request, seconds_until
from spotjax.api.errors import Unavailable, error_from
from spotjax.api.fleet_messages import event_from, reconfiguration_from, status_from
from spotjax.api.proto.spotjax.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from spotjax.api.requests import Prompt, Sampling, built, generate_request
from spotjax.api.resumption import Progress, backoff
from spotjax.engine.generation import Delta
from spotjax.fleet.status import FleetEvent, FleetStatus, Reconfiguration


class SpotjaxClient:
    """A blocking client; several threads may share it."""

    def __init__(
        self, server: str = DEFAULT_SERVER, retries: int = 8, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """Connects at the first call.

        Args:
          server: ``HOST:PORT``.
          retries: how often in a row a broken stream is taken up again before giving up; 8 take about 17 seconds.
          credentials: for a server with TLS, see ``spotjax.transport.credentials``; without them it is plaintext.
        """
        self.server = server
        self._retries = retries
        if credentials is None:
            self._channel = grpc.insecure_channel(server, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(server, credentials, options=OPTIONS)
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._fleet = fleet_pb2_grpc.FleetStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        request_id: str | None = None,
        model: str | None = None,
        resumable: bool = True,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Delta, None, None]:
        """Streams the output for a prompt as it is committed."""
        request_id = request_id or secrets.token_hex(16)
        request = generate_request(prompt, sampling, request_id, model, n, resumable)
        progress = Progress(request_id, [0] * n)
        try:
            yield from self._stream(self._generation.Generate, request, progress, resumable, timeout)
        finally:
            if progress.accepted and not progress.complete:  # nobody waits for the rest
                with contextlib.suppress(Exception):
                    self.cancel(request_id, timeout=CANCEL_TIMEOUT)

    def resume(
        self, request_id: str, offsets: Sequence[int] = (0,), timeout: float | None = None
    ) -> Generator[Delta, None, None]:
        """Streams what is left of an accepted request; ``offsets`` has the number of tokens seen of every choice."""
        progress = Progress(request_id, list(offsets))
        yield from self._stream(self._generation.Resume, progress.resume_request(), progress, True, timeout)

    def cancel(self, request_id: str, timeout: float | None = None) -> bool:
        """Ends a request at its next token; False when it had already finished."""
        request = built(generation_pb2.CancelRequest, request_id=request_id)
        return bool(self._call(self._generation.Cancel, request, timeout).cancelled)

    def models(self) -> list[generation_pb2.Model]:
        """What is served."""
        return list(self._call(self._generation.Models, generation_pb2.ModelsRequest()).models)

    def ready(self) -> bool:
        """Whether requests are served; False while the server starts or drains."""
        answer = self._call(self._health.Check, health_pb2.HealthCheckRequest(service="readiness"))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def status(self) -> FleetStatus:
        """A snapshot of instances, mesh and load."""
        return status_from(self._call(self._fleet.Status, fleet_pb2.StatusRequest()))

    def watch(self, follow: bool = True) -> Generator[FleetEvent, None, None]:
        """Recent events, then, to ``follow``, new ones until the server stops."""
        call = self._fleet.Watch(fleet_pb2.WatchRequest(recent_only=not follow))
        try:
            yield from map(event_from, call)
        except grpc.RpcError as failure:
            raise error_from(failure, self.server) from None
        finally:
            call.cancel()

    def preempt(self, instance: str, grace_seconds: float = 0.0) -> Reconfiguration:
        """Takes an instance away; returns when it is gone."""
        request = built(fleet_pb2.PreemptRequest, instance=instance, grace_seconds=grace_seconds)
        return reconfiguration_from(self._call(self._fleet.Preempt, request))

    def drain(self, instance: str) -> Reconfiguration:
        """Moves the mesh off an instance without a deadline and lets it leave; returns when it may be switched off."""
        return reconfiguration_from(self._call(self._fleet.Drain, built(fleet_pb2.DrainRequest, instance=instance)))

    def add(self, count: int = 1) -> Reconfiguration:
        """Lets instances join; returns when they serve."""
        return reconfiguration_from(self._call(self._fleet.Add, built(fleet_pb2.AddRequest, count=count)))

    def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as failure:
            raise error_from(failure, self.server) from None

    def _stream(
        self, method: Any, request: Any, progress: Progress, resumable: bool, timeout: float | None
    ) -> Generator[Delta, None, None]:
        """The responses to one call, and to as many ``Resume`` calls as it takes to see the end."""
        deadline = deadline_after(timeout)
        failures = 0
        while True:
            call = method(request, timeout=seconds_until(deadline))
            try:
                for response in call:
                    failures = 0
                    yield progress.take(response)
                return
            except grpc.RpcError as failure:
                error = error_from(failure, self.server)
            finally:
                call.cancel()
                progress.accepted |= names_request(call.initial_metadata())
            failures += 1
            if not progress.accepted or not resumable or not isinstance(error, Unavailable) or failures > self._retries:
                raise error
            time.sleep(backoff(failures))
            method, request = self._generation.Resume, progress.resume_request()
