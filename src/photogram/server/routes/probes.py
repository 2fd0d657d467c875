"""Whether the server lives, and whether it can make pictures now."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...engine import Engine
from ..answers import json_answer
from ..schemas import Health, Readiness
from . import with_and_without_v1


def probe_routes(engine: Engine, is_draining: Callable[[], bool]) -> list[Route]:
    async def health(request: Request) -> Response:
        return json_answer(Health("ok"))

    async def ready(request: Request) -> Response:
        return _readiness(engine, draining=is_draining())

    return [
        *with_and_without_v1("/health", health),
        *with_and_without_v1("/liveness", health),
        *with_and_without_v1("/ready", ready),
        *with_and_without_v1("/health_generate", ready),
    ]


def _readiness(engine: Engine, *, draining: bool) -> Response:
    status = engine.status
    is_ready = status.state == "ready" and not draining
    body = Readiness(
        status="ready" if is_ready else "not_ready",
        state="draining" if draining else status.state,
        detail="The server is shutting down." if draining else status.detail,
        num_restarts=status.num_restarts,
    )
    return json_answer(body, 200 if is_ready else 503, None if is_ready else {"retry-after": "2"})
