"""The blocking Python client of a Spotjax server. ``spotjax.async_client`` has the same for asyncio.

    with SpotjaxClient("127.0.0.1:8470") as client:
        for delta in client.generate("Once upon a time", max_tokens=64):
            print(delta.text, end="")

A resumable request (the default) outlives its connection and the server's process: the client connects again, sends
the request again if the server never had it, and takes the stream up where it stopped, so the caller sees each token
exactly once. It waits ``patience`` seconds for a server that it has met; one that never answered is not waited for, its
address may be wrong. Waiting is logged as ``spotjax.client``, level INFO. Closing ``generate`` early ends its request.

Methods raise the errors of ``spotjax.errors`` as the server raised them, ``Unavailable`` when no server answers, and
``TimeoutError`` when ``timeout`` seconds, waits and all, were not enough.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spotjax.api.calls import (
    CANCEL_TIMEOUT,
    DEFAULT_SERVER,
    OPTIONS,
    SAVE_SECONDS,
    authorization,
    deadline_after,
    names_request,
    seconds_until,
    until_deadline,
)
from spotjax.api.errors import Unavailable, error_from
from spotjax.api.fleet_messages import event_from, reconfiguration_from, saved_from, status_from
from spotjax.api.patience import DEFAULT_PATIENCE, Patience
from spotjax.api.proto.spotjax.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from spotjax.api.requests import Prompt, Sampling, built, generate_request
from spotjax.api.resumption import Progress, Pursuit
from spotjax.engine.generation import Delta
from spotjax.fleet.status import FleetEvent, FleetStatus, Reconfiguration, Saved


class SpotjaxClient:
    """A blocking client; several threads may share it."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        patience: float = DEFAULT_PATIENCE,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        """Connects at the first call.

        Args:
          server: ``HOST:PORT``.
          patience: for how many seconds in a row a server that it has met may be away before a stream gives up; 0
            never tries again.
          credentials: for a server with TLS, see ``spotjax.transport.credentials``; without them it is plaintext.
          api_key: for a server that wants one; None takes that of the variable ``SPOTJAX_API_KEY``, if there is one.

        Raises:
          ConfigError: patience is negative, or the key is none.
        """
        self.server = server
        self._patience = Patience(patience).seconds
        self._met = False
        self._metadata = authorization(api_key)
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
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Unpack[Sampling],
    ) -> Generator[Delta, None, None]:
        """Streams the output for a prompt as it is committed."""
        request_id = request_id or secrets.token_hex(16)
        request = generate_request(prompt, sampling, request_id, model, n, resumable, tools)
        pursuit = Pursuit(Progress(request_id, [0] * n), request, self._patience if resumable else 0, self.server)
        try:
            yield from self._stream(pursuit, timeout)
        finally:
            if pursuit.abandoned:
                with contextlib.suppress(Exception):
                    self.cancel(request_id, timeout=CANCEL_TIMEOUT)

    def resume(
        self, request_id: str, offsets: Sequence[int] = (0,), timeout: float | None = None
    ) -> Generator[Delta, None, None]:
        """Streams what is left of an accepted request; ``offsets`` has the number of tokens seen of every choice."""
        yield from self._stream(
            Pursuit(Progress(request_id, list(offsets)), None, self._patience, self.server), timeout
        )

    def cancel(self, request_id: str, timeout: float | None = None) -> bool:
        """Ends a request at its next token; False when it had already finished."""
        request = built(generation_pb2.CancelRequest, request_id=request_id)
        return bool(self._call(self._generation.Cancel, request, timeout).cancelled)

    def models(self) -> list[generation_pb2.Model]:
        """What is served; waits while the server starts."""
        patience = Patience(self._patience)
        self._meet()
        while True:
            try:
                answer = self._call(self._generation.Models, generation_pb2.ModelsRequest())
            except Unavailable as error:
                time.sleep(patience.wait_after(error))
            else:
                patience.tell_end("the server is back")
                return list(answer.models)

    def ready(self) -> bool:
        """Whether requests are served; False while the server starts or drains."""
        answer = self._call(self._health.Check, health_pb2.HealthCheckRequest(service="readiness"))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def status(self) -> FleetStatus:
        """A snapshot of instances, mesh and load."""
        return status_from(self._call(self._fleet.Status, fleet_pb2.StatusRequest()))

    def watch(self, follow: bool = True) -> Generator[FleetEvent, None, None]:
        """Recent events, then, to ``follow``, new ones until the server stops."""
        call = self._fleet.Watch(fleet_pb2.WatchRequest(recent_only=not follow), metadata=self._metadata)
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

    def save(
        self, directory: str, *, parameters: bool = True, state: bool = False, seconds: float = SAVE_SECONDS
    ) -> Saved:
        """Has a checkpoint written; returns when it is there. See ``fleet.service.FleetService.save``."""
        request = built(fleet_pb2.SaveRequest, directory=directory, parameters=parameters, state=state, seconds=seconds)
        return saved_from(self._call(self._fleet.Save, request))

    def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise error_from(failure, self.server) from None

    def _meet(self, timeout: float | None = None) -> None:
        """Has an answer from the server before it is worth waiting for: its address may be wrong.

        Raises:
          Unavailable: no server answers.
        """
        if self._patience > 0 and not self._met:
            self._call(self._health.Check, health_pb2.HealthCheckRequest(), timeout)
            self._met = True

    def _stream(self, pursuit: Pursuit, timeout: float | None) -> Generator[Delta, None, None]:
        """The responses to as many calls as it takes to see the end."""
        deadline = deadline_after(timeout)
        self._meet(timeout)
        while True:
            method, request = pursuit.next_call()
            call = getattr(self._generation, method)(request, timeout=seconds_until(deadline), metadata=self._metadata)
            try:
                if names_request(call.initial_metadata()):
                    pursuit.opened()
                for response in call:
                    if (delta := pursuit.take(response)) is not None:
                        yield delta
                return
            except grpc.RpcError as failure:
                error = error_from(failure, self.server)
            finally:
                call.cancel()
            if pursuit.progress.complete:
                return
            time.sleep(until_deadline(pursuit.wait_after(error), deadline))
