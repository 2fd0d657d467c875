"""An HTTP client that dials only the addresses it has checked.

A host is looked up once per connection, and the connection goes to an address of that very answer: a name that
resolves otherwise a moment later changes nothing. Proxies of the environment are not used, for they would dial for us;
redirects are followed one by one and checked like the first URL; nothing is kept open, no cookies are kept, no
compression is accepted.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

import certifi
import httpcore

from .. import __version__
from ..core.errors import RequestError, StorageFailed, TooLarge
from .address import AllowedHosts, Target, is_public, join, no_public_address, parse_url

MAX_HOPS = 5
FETCH_S = 20.0
"""Seconds a whole fetch may take, lookups, redirects and slow bytes included."""
_CONNECT_S = 5.0
_MAX_FETCHES = 32
_SPOOL_BYTES = 1 << 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_AGENT = f"photogram/{__version__}"

Lookup = Callable[[str, int], Sequence[str]]
"""Gives the addresses of a host, best first; blocks, and runs in a thread. Raises OSError."""


class FetchFailed(RequestError):
    """A URL that may be fetched and could not be."""

    code = "url_fetch_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer without its body; header names are in lower case."""

    status: int
    headers: Mapping[str, str]


def system_lookup(host: str, port: int) -> Sequence[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Outbound:
    """Fetches what clients name by URL, and posts to where they ask. One per server; lives on the event loop."""

    def __init__(
        self, allowed: Iterable[str] = (), *, lookup: Lookup = system_lookup, trusted: ssl.SSLContext | None = None
    ) -> None:
        """`allowed` are hosts as in `--allow-url-host`; `trusted` replaces the usual certificate authorities."""
        self._allowed = AllowedHosts.parse(allowed)
        self._lookup = lookup
        self._trusted = trusted
        # Threads of our own: a name server that hangs must not hold up those who wait for a disk.
        self._lookups = ThreadPoolExecutor(4, thread_name_prefix="photogram-lookup")
        self._slots = asyncio.Semaphore(_MAX_FETCHES)

    def check(self, url: str, param: str) -> None:
        """Raise UrlRefused for a URL that would never be reached out to, whatever its host's addresses."""
        parse_url(url, self._allowed, param)

    async def fetch(self, url: str, param: str, *, max_bytes: int, timeout_s: float = FETCH_S) -> IO[bytes]:
        """Return the body of a 200 answer as an open file, which stands at its start; the caller closes it.

        Raises UrlRefused, FetchFailed or TooLarge, naming `param`.
        """
        file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - the caller's
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                await self._fetch(parse_url(url, self._allowed, param), param, max_bytes, file)
            file.seek(0)
        except TimeoutError:
            file.close()
            raise FetchFailed(f"'{param}': the URL was not fetched within {timeout_s:g} s.", param=param) from None
        except BaseException:
            file.close()
            raise
        return file

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, param: str, timeout_s: float = FETCH_S
    ) -> Answer:
        """Post a body and return the answer, whatever its status; a redirect is an answer and is not followed.

        Raises UrlRefused for a URL that is not reached out to, FetchFailed when there is no answer.
        """
        target = parse_url(url, self._allowed, param)
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                async with self._answer(target, param, "POST", headers, body) as response:
                    return _told(response)
        except TimeoutError:
            raise FetchFailed(f"'{param}': no answer within {timeout_s:g} s.", param=param) from None

    async def close(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, target: Target, param: str, max_bytes: int, file: IO[bytes]) -> None:
        for _ in range(MAX_HOPS + 1):
            async with self._answer(target, param, "GET", {"accept-encoding": "identity"}, None) as response:
                told = _told(response)
                if told.status == 200:
                    await _read(response, told, param, max_bytes, file)
                    return
                location = told.headers.get("location")
                if told.status not in _REDIRECTS or location is None:
                    raise FetchFailed(f"'{param}': the URL's server answered {told.status}.", param=param)
            target = join(target, location, self._allowed, param)
        raise FetchFailed(f"'{param}': more than {MAX_HOPS} redirects.", param=param)

    @asynccontextmanager
    async def _answer(
        self, target: Target, param: str, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[httpcore.Response]:
        """Send one request on a connection of its own, which is closed afterwards."""
        dialler = _Dialler(self, target, param)
        origin = httpcore.Origin(target.scheme.encode(), target.host.encode(), target.port)
        connection = httpcore.AsyncHTTPConnection(origin, ssl_context=self._context(), network_backend=dialler)
        sent = {"host": target.authority, "user-agent": _AGENT, "accept": "*/*", "connection": "close", **headers}
        if body is not None:
            sent["content-length"] = str(len(body))
        request = httpcore.Request(
            method,
            httpcore.URL(
                scheme=target.scheme.encode(),
                host=target.host.encode(),
                port=target.port,
                target=target.path.encode("ascii"),
            ),
            headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in sent.items()],
            content=body,
            extensions={"timeout": {"connect": _CONNECT_S}},
        )
        try:
            response = await connection.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()
        except httpcore.ConnectTimeout:
            raise FetchFailed(f"'{param}': host '{target.host}' does not answer.", param=param) from None
        except (
            httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, ssl.SSLError, OSError
        ) as error:  # fmt: skip
            raise FetchFailed(f"'{param}': host '{target.host}': {_reason(error)}.", param=param) from None
        finally:
            await connection.aclose()

    def _context(self) -> ssl.SSLContext:
        if self._trusted is None:
            self._trusted = ssl.create_default_context()
            self._trusted.load_verify_locations(certifi.where())
        return self._trusted

    async def addresses(self, target: Target, param: str) -> list[str]:
        """Return the addresses that may be dialled for a target. Raises UrlRefused where there is none."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._lookups, self._lookup, target.host, target.port)
        except (OSError, UnicodeError):
            raise no_public_address(target.host, param) from None
        allowed = self._allowed.holds(target.host, target.port)
        dialled = [address for address in dict.fromkeys(found) if allowed or is_public(address)]
        if not dialled:
            raise no_public_address(target.host, param)
        return dialled


class _Dialler(httpcore.AsyncNetworkBackend):
    """Connects one request to an address that was checked, in place of a name that anybody may answer."""

    def __init__(self, outbound: Outbound, target: Target, param: str) -> None:
        self._outbound = outbound
        self._target = target
        self._param = param
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        assert (host, port) == (self._target.host, self._target.port)
        failure: Exception | None = None
        for address in await self._outbound.addresses(self._target, self._param):
            try:
                return await self._sockets.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure


async def _read(response: httpcore.Response, told: Answer, param: str, max_bytes: int, file: IO[bytes]) -> None:
    """Write the body to the file. Raises TooLarge as soon as it is known to be over the bound."""
    encoding = told.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise FetchFailed(f"'{param}': the URL's server sent content-encoding '{encoding[:40]}' unasked.", param=param)
    too_large = TooLarge(f"'{param}': the URL's file exceeds {max_bytes} bytes (--max-upload-mb).", param=param)
    announced = told.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    received = 0
    async for chunk in response.aiter_stream():
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        try:
            file.write(chunk)
        except OSError as error:
            raise StorageFailed(f"'{param}': the file could not be kept: {error.strerror}.", param=param) from error


def _told(response: httpcore.Response) -> Answer:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
    return Answer(status=response.status, headers=headers)


def _reason(error: Exception) -> str:
    if "CERTIFICATE_VERIFY" in str(error):
        return "its certificate is not trusted"
    if isinstance(error, httpcore.ConnectError | ssl.SSLError):
        return "no connection"
    return "the connection broke off"
