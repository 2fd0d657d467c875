"""The endpoints, one file each; `server/app` is the table that names them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# What nginx logs for a client that hung up; nobody reads it.
CLIENT_GONE = 499

Endpoint = Callable[[Request], Awaitable[Response]]


def with_and_without_v1(path: str, endpoint: Endpoint, methods: Sequence[str] = ("GET",)) -> list[Route]:
    """Return the route under ``/v1`` and without it: some people leave the ``/v1`` out of the base URL."""
    return [Route(f"/v1{path}", endpoint, methods=list(methods)), Route(path, endpoint, methods=list(methods))]
