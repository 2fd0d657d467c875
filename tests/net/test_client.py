"""What is dialled and what is taken: redirects, rebinding, endless and slow bodies, certificates."""

import asyncio
import ssl
import time

import pytest

from photogram.core.errors import RequestError, TooLarge
from photogram.net.address import AllowedHosts, UrlRefused, parse_url
from photogram.net.client import MAX_HOPS, FetchFailed, Outbound

from .web import CERTIFICATES, drip, endless, lead_to, say, web


async def fetch(url, *, allowed=(), max_bytes=100_000, timeout_s=5.0, **options):
    outbound = Outbound(allowed, **options)
    try:
        with await outbound.fetch(url, "url", max_bytes=max_bytes, timeout_s=timeout_s) as file:
            return file.read()
    finally:
        await outbound.close()


def refused(url, kind: type[RequestError] = UrlRefused, **options) -> str:
    with pytest.raises(kind) as raised:
        asyncio.run(fetch(url, **options))
    assert raised.value.param == "url"
    return raised.value.message


def test_a_permitted_host_is_fetched_with_nothing_that_tells_of_us_or_could_be_compressed():
    with web({"/a.png?x=1": say(b"picture")}) as server:
        data = asyncio.run(fetch(f"{server.url}/a.png?x=1#top", allowed=[f"127.0.0.1:{server.port}"]))
        ((method, _, headers, _),) = server.seen
    assert (data, method) == (b"picture", "GET")
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == f"127.0.0.1:{server.port}"
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}


def test_an_inside_address_is_never_dialled():
    with web() as server:
        port = server.port
        for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "[::ffff:127.0.0.1]"):
            refused(f"http://{host}:{port}/")
        refused(f"http://localhost:{port}/", allowed=["localhost"])
        # A name of its own, and a permitted port: the address alone decides.
        refused("http://inside.example/", lookup=lambda host, port: ["127.0.0.1", "::1", "10.0.0.1"])
    assert server.seen == []


def test_a_name_that_does_not_exist_reads_like_an_inside_one():
    def unknown(host: str, port: int) -> list[str]:
        raise OSError("no such host")

    message = refused("http://a.example/", lookup=unknown)
    assert message == refused("http://a.example/", lookup=lambda host, port: ["192.168.0.1"])


def test_the_checked_address_is_the_dialled_one_though_the_name_answers_otherwise_later():
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    with web({"/": say(b"the first answer's")}) as server:
        url = f"http://rebind.example:{server.port}/"
        allowed = [f"rebind.example:{server.port}"]
        assert asyncio.run(fetch(url, allowed=allowed, lookup=lambda *_: next(answers))) == b"the first answer's"
    assert next(answers) == ["127.0.0.2"]  # one look-up per connection


def test_of_a_mixed_answer_only_public_addresses_are_dialled():
    async def dialled() -> list[str]:
        outbound = Outbound(lookup=lambda *_: ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1", "8.8.8.8"])
        return await outbound.addresses(parse_url("http://mixed.example/", AllowedHosts(), "url"), "url")

    assert asyncio.run(dialled()) == ["8.8.8.8", "2606:4700::1"]


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with web({"/": say(b"direct")}) as server, web() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert asyncio.run(fetch(f"{server.url}/", allowed=[f"127.0.0.1:{server.port}"])) == b"direct"
        assert proxy.seen == []


def test_every_hop_is_looked_up_and_checked_anew():
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    with web() as server:
        server.pages["/"] = lead_to(f"http://rebind.example:{server.port}/again")
        allowed = [f"first.example:{server.port}"]
        # The second hop is the same name's port, but not a permitted host.
        refused(f"http://first.example:{server.port}/", allowed=allowed, lookup=lambda *_: next(answers))
        assert server.paths() == ["/"]


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:1/", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "//[::1]/", "http://0/"],
)
def test_redirects_to_the_inside_are_refused(location):
    with web({"/": lead_to(location)}) as server:
        refused(f"{server.url}/", allowed=[f"127.0.0.1:{server.port}"])


def test_redirects_are_followed_and_counted():
    with web({"/": lead_to("b"), "/b": lead_to("/c", 307), "/c": say(b"here"), "/loop": lead_to("/loop")}) as server:
        allowed = [f"127.0.0.1:{server.port}"]
        assert asyncio.run(fetch(f"{server.url}/", allowed=allowed)) == b"here"
        assert "redirects" in refused(f"{server.url}/loop", FetchFailed, allowed=allowed)
        assert server.paths().count("/loop") == MAX_HOPS + 1


def test_bodies_are_cut_off_at_the_bound_whether_announced_or_not():
    with web({"/long": say(b"x" * 200_000), "/endless": endless}) as server:
        for path in ("/long", "/endless"):
            refused(server.url + path, TooLarge, allowed=[f"127.0.0.1:{server.port}"])


def test_slow_bodies_and_silent_servers_end_at_the_time_bound():
    with web({"/drip": drip, "/silent": lambda request: time.sleep(3)}) as server:
        for path in ("/drip", "/silent"):
            began = time.monotonic()
            refused(server.url + path, FetchFailed, allowed=[f"127.0.0.1:{server.port}"], timeout_s=0.3)
            assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    "page",
    [
        say(b"no", status=404),
        say(b"", status=304),
        say(b"", status=302),
        say(b"\x1f\x8b", content_encoding="gzip"),
        lambda request: request.wfile.write(b"SSH-2.0-nothing\r\n"),
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort"),
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 500_000),
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"),
    ],
)
def test_answers_that_are_no_file_fail_with_a_reason(page):
    with web({"/": page}) as server:
        refused(f"{server.url}/", FetchFailed, allowed=[f"127.0.0.1:{server.port}"])


def test_tls_is_checked_against_the_name_not_the_dialled_address():
    trusted = ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
    here = {"lookup": lambda host, port: ["127.0.0.1"]}
    with web({"/": say(b"private")}, tls=True) as server:
        names = [f"pictures.test:{server.port}", f"other.test:{server.port}"]
        good = f"https://pictures.test:{server.port}/"
        assert asyncio.run(fetch(good, allowed=names, trusted=trusted, **here)) == b"private"
        other = f"https://other.test:{server.port}/"
        assert "certificate" in refused(other, FetchFailed, allowed=names, trusted=trusted, **here)
        assert "certificate" in refused(good, FetchFailed, allowed=names, **here)


def test_the_next_address_is_tried_when_one_does_not_answer():
    with web({"/": say(b"second")}) as server:
        url = f"http://two.example:{server.port}/"
        found = asyncio.run(
            fetch(url, allowed=[f"two.example:{server.port}"], lookup=lambda *_: ["127.0.0.9", "127.0.0.1"])
        )
    assert found == b"second"


def test_posts_carry_their_body_and_follow_no_redirect():
    async def post(outbound: Outbound, url: str) -> int:
        answer = await outbound.post(url, b"{}", {"content-type": "application/json"}, param="webhook_url")
        return answer.status

    async def story(server) -> list[int]:
        outbound = Outbound([f"127.0.0.1:{server.port}"])
        return [await post(outbound, f"{server.url}{path}") for path in ("/hook", "/moved")]

    with web({"/hook": say(b"fine"), "/moved": lead_to("/hook")}) as server:
        assert asyncio.run(story(server)) == [200, 302]
        assert [(method, path, body) for method, path, _, body in server.seen] == [
            ("POST", "/hook", b"{}"),
            ("POST", "/moved", b"{}"),
        ]
        assert server.seen[0][2]["content-type"] == "application/json"


def test_posts_to_the_inside_are_refused_and_dead_servers_told():
    async def post(url: str, **options) -> None:
        await Outbound(**options).post(url, b"{}", {}, param="webhook_url")

    with pytest.raises(UrlRefused) as raised:
        asyncio.run(post("http://127.0.0.1/hook"))
    assert raised.value.param == "webhook_url"
    with pytest.raises(FetchFailed):
        asyncio.run(post("http://127.0.0.1:1/hook", allowed=["127.0.0.1:1"]))
