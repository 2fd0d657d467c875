"""One client's connection: uvicorn's protocol, with an end to its patience.

uvicorn waits for ever for the head of a first request, takes heads of any size, reads on for ever what follows an
answered request, and holds an answer for ever that nobody reads. Here each has a bound, so that slow and endless
clients cost a connection for a while and nothing more. How slowly a body may come is `server/body`'s affair.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .problems import ErrorBody, ErrorDetail

_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds for a request's head, for the rest of a request that was answered early, and for an answer's next part
    to be read; and the bytes of a head."""

    head_s: float = 20.0
    head_bytes: int = 64 << 10
    linger_s: float = 5.0
    reader_s: float = 60.0


class Connection(HttpToolsProtocol):
    patience: ClassVar[Patience] = Patience()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = False
        self._message_complete = True
        self._reader_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = self._later(self.patience.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        self._end_reader_timer()
        super().connection_lost(exc)

    # --- what comes -----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            self._bound_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._message_complete, self._head_bytes = True, False, 0
        if self._head_timer is None:
            self._head_timer = self._later(self.patience.head_s, self._head_is_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        else:
            # Trailers behind a chunked body: of no use here, and else kept without a bound.
            self._head_bytes += len(name) + len(value)
            self._bound_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._end_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._message_complete = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._message_complete and not self.transport.is_closing():
            # Closed at once, a client that is still sending would lose the answer.
            self._later(self.patience.linger_s, self._close_if_unfinished)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "invalid_http")

    # --- what goes ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_reader_timer()
        self._reader_timer = self._later(self.patience.reader_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_reader_timer()
        super().resume_writing()

    # --- bounds ---------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, act: object) -> asyncio.TimerHandle:
        assert callable(act)
        return self.loop.call_later(seconds, act)

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _head_is_late(self) -> None:
        self._refuse(408, f"The request's head did not come within {self.patience.head_s:g} s.", "request_timeout")

    def _bound_head(self) -> None:
        if self._head_bytes > self.patience.head_bytes and not self.transport.is_closing():
            message = f"The request's head is larger than {self.patience.head_bytes} bytes."
            self._refuse(431, message, "request_too_large")

    def _close_if_unfinished(self) -> None:
        if not self._message_complete:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer in our shape, outside of any request, and close."""
        detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code=code)
        body = msgspec.json.encode(ErrorBody(error=detail, detail=message))
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
            self.transport.close()
