"""A server that speaks OpenAI's dialect over HTTP, asked with aiohttp: the extra ``bench``.

aiohttp was chosen by what it costs for each piece of an answer, see docs/benchmarking.md: a client that computes longer
than its server measures itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from spotjax.api.calls import authorization
from spotjax.bench import openai
from spotjax.bench.exchange import Exchange, PlannedRequest
from spotjax.bench.load import Clock
from spotjax.bench.sse import EventStream
from spotjax.errors import ConfigError, EndpointFailed

if TYPE_CHECKING:
    import aiohttp

CONNECT_SECONDS = 30.0
IDLE_SECONDS = 3.0
"""Idle connections are closed before a server does it (uvicorn: after 5 s): no request goes to one that is closed."""
MOST_ERROR = 1 << 16


class HttpEndpoint:
    """The server. Connections are kept and used again; there are as many as requests in flight.

    Args:
      url: such as ``http://127.0.0.1:8471``; a path other than ``/v1`` can be given.
      dialect: completions or chats.
      model: name to ask for; None until ``find_model`` has found it.
      options: fields of every request, such as the temperature.
      api_key: sent as a bearer token; None for that of the variable ``SPOTJAX_API_KEY``, if there is one.
      tls: for https; None for the system's authorities.

    Raises:
      ConfigError: the URL or the key is none, TLS is given for http, or aiohttp is not installed.
    """

    def __init__(
        self,
        url: str,
        dialect: openai.Dialect,
        model: str | None = None,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        require_aiohttp()
        self.base = base_url(url)
        if tls is not None and not self.base.startswith("https:"):
            raise ConfigError(f"--server {url}: TLS needs a URL that begins with https://")
        self.model, self._dialect, self._options, self._tls = model, dialect, options or {}, tls
        self._headers = {"accept-encoding": "identity", **dict(authorization(api_key))}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True, keepalive_timeout=IDLE_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *unused: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def find_model(self) -> str:
        """The name that requests have: the one that was given, or the first that the server lists.

        Raises:
          EndpointFailed: there is no server, or it lists none.
        """
        if self.model is None:
            import aiohttp

            assert self._session is not None
            try:
                async with self._session.get(f"{self.base}/models") as response:
                    await check_status(response)
                    self.model = openai.models(await response.read())[0]
            except (aiohttp.ClientError, OSError) as problem:
                raise failed(problem, self.base) from None
        return self.model

    async def send(self, request: PlannedRequest, exchange: Exchange, clock: Clock) -> None:
        """See ``load.Endpoint``."""
        import aiohttp

        assert self._session is not None and self.model is not None
        body = openai.body(self._dialect, self.model, request, self._options)
        try:
            async with self._session.post(f"{self.base}{openai.PATHS[self._dialect]}", json=body) as response:
                await check_status(response)
                if response.content_type != "text/event-stream":
                    raise EndpointFailed("not a stream", f"the answer is {response.content_type}")
                await read(response, exchange, clock)
        except (aiohttp.ClientError, OSError) as problem:
            raise failed(problem, self.base) from None


async def read(response: aiohttp.ClientResponse, exchange: Exchange, clock: Clock) -> None:
    """Notes a streamed answer.

    Raises:
      EndpointFailed: it is not complete, or not one.
    """
    stream, done = EventStream(), False
    try:
        async for piece in response.content.iter_any():
            at = clock()
            for data in stream.feed(piece):
                if data == openai.DONE:
                    done = True
                else:
                    openai.take(data, exchange, at)
    except ValueError as problem:
        raise EndpointFailed("garbage", problem) from None
    for data in stream.end():
        if data == openai.DONE:
            done = True
        else:
            openai.take(data, exchange, clock())
    openai.check_end(exchange, done)


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Raises what the server says when it is not 200."""
    if response.status != 200:
        said = openai.error_message(await response.content.read(MOST_ERROR))
        raise EndpointFailed(f"http {response.status}", said or response.reason)


def failed(problem: Exception, base: str) -> EndpointFailed:
    """What a connection's failure is called."""
    import aiohttp

    if isinstance(problem, aiohttp.ClientConnectorError) and isinstance(problem.os_error, ConnectionRefusedError):
        return EndpointFailed("connection refused", f"no server listens at {base}")
    if isinstance(problem, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError):
        return EndpointFailed("no connection", f"{base}: {problem}")
    return EndpointFailed("broken connection", f"{type(problem).__name__}: {problem}")


def base_url(url: str) -> str:
    """Where the paths of the dialect begin: ``/v1`` of the server unless another path is given.

    Raises:
      ConfigError: it is no URL of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--server {url!r}: expected a URL such as http://127.0.0.1:8471")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def tls_context(certificate: str | None, key: str | None, authority: str | None) -> ssl.SSLContext | None:
    """Who we are and whom to trust, all PEM files, or ``system`` for the authorities of this machine; None for that.

    Raises:
      ConfigError: a file is of no use, or a certificate has no key or the other way round.
    """
    if bool(certificate) is not bool(key):
        raise ConfigError("--tls-certificate and --tls-key go together")
    if not certificate and not authority:
        return None
    try:
        context = ssl.create_default_context(cafile=None if authority == "system" else authority)
        if certificate:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as problem:
        raise ConfigError(f"TLS: a file of --tls-certificate, --tls-key or --tls-authority: {problem}") from problem
    return context


def require_aiohttp() -> None:
    """Raises ConfigError when aiohttp is not installed."""
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ConfigError("HTTP servers are measured with aiohttp: pip install 'spotjax[bench]'") from error
