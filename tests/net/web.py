"""A real web server on loopback that does what a path tells it, honest or not, and notes what it was asked."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CERTIFICATES = Path(__file__).parent / "certificates"

Page = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """One running server. `pages` answers by path; `seen` holds (method, path, headers, body) of every request."""

    def __init__(self, pages: dict[str, Page], *, tls: bool = False, address: str = "127.0.0.1") -> None:
        self.pages = pages
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                web.seen.append((self.command, self.path, headers, body))
                page = web.pages.get(self.path)
                with suppress(ConnectionError):
                    page(self) if page else say(b"nothing here", status=404)(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATES / "server.pem")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.seen]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def web(pages: dict[str, Page] | None = None, **options: object) -> Iterator[Web]:
    server = Web(pages or {}, **options)
    try:
        yield server
    finally:
        server.close()


def say(body: bytes, *, status: int = 200, length: bool = True, **headers: str) -> Page:
    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        if length:
            request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return page


def lead_to(url: str, status: int = 302) -> Page:
    return say(b"", status=status, location=url)


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b"\0" * 65536)


def drip(request: BaseHTTPRequestHandler) -> None:
    """One byte, and the next much later."""
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b"\0")
        request.wfile.flush()
        time.sleep(0.05)
