"""Both clients behind one interface, so that each promise is tested of each."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.client import SpotjaxClient


class Blocking:
    """The blocking client behind the interface of the other: every call runs on a thread."""

    def __init__(self, server: str, **options: Any) -> None:
        self._client = SpotjaxClient(server, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*values: Any, **named: Any) -> Any:
            return await asyncio.to_thread(getattr(self._client, name), *values, **named)

        async def stream(*values: Any, **named: Any) -> AsyncIterator[Any]:
            iterator = getattr(self._client, name)(*values, **named)
            end = object()
            try:
                while (item := await asyncio.to_thread(next, iterator, end)) is not end:
                    yield item
            finally:
                await asyncio.to_thread(iterator.close)

        return stream if name in ("generate", "resume", "watch") else call


CLIENTS = (AsyncSpotjaxClient, Blocking)
