"""The service as one caller sees it: within its limits, and with its own requests only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from functools import partial

from spotjax.api.access.callers import Caller
from spotjax.api.access.metering import Meters
from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.errors import UnknownRequest
from spotjax.fleet.service import GenerationService


class CallerService:
    """A ``GenerationService`` for one caller; both gRPC and HTTP generate through it.

    Args:
      service: everybody's.
      caller: whose requests these are.
      meters: what callers have used.
      model: name of the model that is served.
    """

    def __init__(self, service: GenerationService, caller: Caller, meters: Meters, model: str) -> None:
        self._service, self._caller, self._meters, self._model = service, caller, meters, model

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        """See ``GenerationService.submit``; the request belongs to the caller from here on.

        Raises:
          PermissionDenied: the caller may not use the model, or a prompt of this size.
          RateLimited: it has used up what it may use.
        """
        caller, prompt_tokens = self._caller, len(request.prompt)
        caller.require_model(self._model)
        request = replace(request, owner=caller.name)
        if self._exists(request.request_id):
            return self._service.submit(request)  # which says that it exists: a client whose call broke learns that
        self._meters.admit(caller, prompt_tokens)
        try:
            recorded = asyncio.ensure_future(self._service.submit(request))
        except BaseException:
            self._meters.give_back(caller, prompt_tokens)
            raise
        recorded.add_done_callback(partial(self._settle, prompt_tokens))
        return recorded

    def accepted(self, request_id: str) -> GenerationRequest:
        """See ``GenerationService.accepted``. Others' requests are not known to the caller."""
        try:
            request = self._service.accepted(request_id)
        except UnknownRequest as error:
            raise self._unknown(request_id) from error
        if not self._caller.may_follow(request.owner):
            raise self._unknown(request_id)
        return request

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """See ``GenerationService.stream``. Others' requests are not known to the caller."""
        self.accepted(request_id)
        return self._service.stream(request_id, offsets)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """See ``GenerationService.cancel``. Others' requests are not known to the caller."""
        self.accepted(request_id)
        return self._service.cancel(request_id, reason)

    def _settle(self, prompt_tokens: int, recorded: asyncio.Future[None]) -> None:
        """A request that could not be recorded is not accepted, and costs nothing."""
        if not recorded.cancelled() and recorded.exception() is not None:
            self._meters.give_back(self._caller, prompt_tokens)

    def _exists(self, request_id: str) -> bool:
        with contextlib.suppress(UnknownRequest):
            self._service.accepted(request_id)
            return True
        return False

    @staticmethod
    def _unknown(request_id: str) -> UnknownRequest:
        """The same of a request that is not there and of one that is another caller's."""
        return UnknownRequest(
            f"no request {request_id!r} of yours is known: it never was, or it finished longer ago than such are kept"
        )
