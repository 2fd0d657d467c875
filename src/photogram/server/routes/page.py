"""The page for trying the server in a browser, and the description of the API for programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.config import ServeConfig
from ..answers import json_answer
from ..schemas import JSONSchema

_PAGE = Path(__file__).parents[2] / "web" / "index.html"
_HEADERS = {
    "cache-control": "no-cache",
    # The page is one file and asks nobody but this server.
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def page_routes(config: ServeConfig, description: Callable[[ServeConfig], JSONSchema]) -> list[Route]:
    html = _PAGE.read_bytes()
    openapi = description(config)

    async def page(request: Request) -> Response:
        return Response(html, headers=_HEADERS, media_type="text/html; charset=utf-8")

    async def openapi_json(request: Request) -> Response:
        return json_answer(openapi)

    return [Route("/", page), Route("/openapi.json", openapi_json), Route("/v1/openapi.json", openapi_json)]
