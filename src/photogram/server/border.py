"""The outermost layer of the app: request ids, keys, spellings of paths, and the answer when all else failed.

Pure ASGI. Knows nothing of what the routes do.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Set

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Keys
from .problems import answer, translate
from .tallies import NO_ROUTE, RequestTally

log = logging.getLogger(__name__)

OPENAI_VERSION = "2020-10-01"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")
_OWNER = "photogram.owner"


def owner_of(request: Request) -> str:
    """Return whose request this is, as `Border` found it."""
    owner = request.scope[_OWNER]
    assert isinstance(owner, str)
    return owner


class Border:
    """Gives every request an id and an owner, every failure an answer in our shape, and counts them all.

    `open_paths` are answered without a key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Set[str], tally: RequestTally) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._tally = tally
        self._random = random.Random()  # ids of requests tell them apart, and guard nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = self._request_id(headers)
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(raw=message["headers"])
                marked["x-request-id"] = request_id
                marked["openai-version"] = OPENAI_VERSION
                marked["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
            await send(message)

        # A redirect would turn some clients' POST into a GET, so a trailing slash is simply not seen.
        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "path": path, "request_id": request_id}
        self._tally.began()
        try:
            if path not in self._open_paths:
                scope[_OWNER] = self._keys.owner(headers)
            await self._app(scope, receive, send_marked)
        except Exception as error:
            problem = translate(error, Request(scope))
            if status is not None:
                # The client sees a body that breaks off; the log has the reason.
                raise
            await answer(problem)(scope, receive, send_marked)
        finally:
            self._tally.ended(_pattern_of(scope), scope["method"], status, time.perf_counter() - began)

    def _request_id(self, headers: Headers) -> str:
        given = headers.get("x-request-id", "")
        return given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{self._random.getrandbits(96):024x}"


def _pattern_of(scope: Scope) -> str:
    """Return the pattern of the route that a request was answered by, without what the client put into it."""
    route = scope.get("route")
    # Starlette names a route for 405, too.
    if isinstance(route, Route) and route.methods is not None and scope["method"] in route.methods:
        return route.path_format
    return NO_ROUTE
