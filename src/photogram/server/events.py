"""Waiting with an eye on the client: server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .problems import error_detail, translate

HEARTBEAT_S = 15.0
KEEPALIVE = b": keepalive\n\n"

T = TypeVar("T")


def event(name: str, data: object) -> bytes:
    """Return one server-sent event. The empty line at its end is what makes clients see it."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


async def client_gone(receive: Receive) -> None:
    """Return when the client has hung up; to be used once the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or None when the client hung up first; `work` is cancelled and awaited then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(client_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _end(gone)
        await _end(task)


async def _end(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


class EventStream(Response):
    """A stream of server-sent events, with a comment every `heartbeat_s` seconds in which nothing else is said.

    `closing` is called when the stream ends, also when the client hangs up before its first event. What `events`
    raises is the last event: ``event: error``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        closing: Callable[[], None],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._events = events
        self._closing = closing
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(client_gone(receive))
        following = asyncio.create_task(self._following())
        try:
            while not gone.done():
                done, _ = await asyncio.wait(
                    {following, gone}, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    await send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})
                if following not in done:
                    continue
                try:
                    chunk = following.result()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    detail = error_detail(translate(error, self._request))
                    await send(
                        {"type": "http.response.body", "body": event("error", {"error": detail}), "more_body": True}
                    )
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                following = asyncio.create_task(self._following())
            if not gone.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._closing()
            await _end(gone)
            await _end(following)
            await self._events.aclose()

    async def _following(self) -> bytes:
        return await anext(self._events)
