"""A Spotjax server over gRPC, asked with the asyncio client. Nothing is tried again: what breaks is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.bench.exchange import Exchange, PlannedRequest
from spotjax.bench.load import Clock
from spotjax.bench.openai import GIVEN_UP
from spotjax.errors import EndpointFailed, SpotjaxError


class GrpcEndpoint:
    """The server.

    Args:
      client: of the server, with a patience of 0.
      model: name to ask for; None until ``find_model`` has found it.
      options: sampling of every request.
    """

    def __init__(
        self, client: AsyncSpotjaxClient, model: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self._client, self._options = model, client, options or {}

    async def find_model(self) -> str:
        """The name that requests have: the one that was given, or that of the model that is served.

        Raises:
          EndpointFailed: there is no server, or it has no model yet.
        """
        if self.model is None:
            try:
                self.model = (await self._client.models())[0].name
            except SpotjaxError as problem:
                raise EndpointFailed(type(problem).__name__, problem) from None
        return self.model

    async def vocabulary(self) -> int:
        """Token ids of the model are below this.

        Raises:
          EndpointFailed: there is no server, or it has no such model.
        """
        try:
            sizes = {model.name: model.vocab_size for model in await self._client.models()}
        except SpotjaxError as problem:
            raise EndpointFailed(type(problem).__name__, problem) from None
        if (name := await self.find_model()) not in sizes:
            raise EndpointFailed("no model", f"the server has no model {name!r}")
        return sizes[name]

    async def send(self, request: PlannedRequest, exchange: Exchange, clock: Clock) -> None:
        """See ``load.Endpoint``."""
        deltas = self._client.generate(
            request.prompt, model=self.model, resumable=False, seed=request.seed, max_tokens=request.output_tokens,
            **self._options,
        )  # fmt: skip
        try:
            async for delta in deltas:
                exchange.piece(clock(), delta.text, len(delta.tokens))
                if delta.usage is not None:
                    exchange.prompt_tokens = delta.usage.prompt_tokens
                    exchange.output_tokens = delta.usage.completion_tokens
                if delta.finish is not None:
                    exchange.finish = str(delta.finish)
        except SpotjaxError as problem:
            raise EndpointFailed(type(problem).__name__, problem) from None
        finally:
            await deltas.aclose()
        if exchange.finish is None:
            raise EndpointFailed("broken stream", f"the stream ended after {len(exchange.times)} pieces")
        if exchange.finish in GIVEN_UP:
            raise EndpointFailed("ended early", f"the server gave as its reason {exchange.finish!r}")
