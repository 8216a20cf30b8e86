"""``/metrics`` for Prometheus: in its own format or as OpenMetrics, as the scraper asks; also while the model loads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def routes(registry: CollectorRegistry) -> list[Route]:
    """``GET``.

    Args:
      registry: what is shown.
    """

    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return [Route("/metrics", scrape)]
