"""What a monitoring system asks every few seconds."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.config import ServeConfig
from ..auth import Keys
from ..metrics import Metrics

METRICS_PATH = "/metrics"


def metrics_routes(config: ServeConfig, metrics: Metrics, keys: Keys) -> list[Route]:
    async def scrape(request: Request) -> Response:
        # The load of the whole server is no affair of each key's holder.
        if not config.open_metrics:
            keys.require_admin(request.headers)
        page, content_type = await metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    return [Route(METRICS_PATH, scrape)]
