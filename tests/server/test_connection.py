"""Clients that send or read slowly, endlessly or nonsense, byte by byte on real sockets."""

import itertools
import json
import re
import socket
import time
from collections.abc import Iterable

import pytest

from photogram.server.connection import Connection, Patience
from photogram.server.forms import BodyLimits

from .conftest import wait_until

CLOSED = (BrokenPipeError, ConnectionResetError)
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def hurried(deploy, monkeypatch):
    """A server with little patience."""
    patience = Patience(head_s=0.4, head_bytes=4096, linger_s=0.3, reader_s=0.5)
    monkeypatch.setattr(Connection, "patience", patience)
    return deploy()


def connected(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    try:
        while chunk := client.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def send_slowly(client: socket.socket, parts: Iterable[bytes]) -> None:
    for part in parts:
        client.sendall(part)
        time.sleep(0.002)


def status_and_code(data: bytes) -> tuple[int, str]:
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_head_that_never_ends_is_answered_408_and_a_silent_client_closed(hurried):
    for start in (b"", b"GET /health HTTP/1.1\r\nx-slow: "):
        with connected(hurried) as client:
            client.sendall(start)
            assert status_and_code(everything(client)) == (408, "request_timeout")


def test_a_head_that_comes_byte_by_byte_has_no_more_time(hurried):
    began = time.monotonic()
    with connected(hurried) as client, pytest.raises(CLOSED):
        send_slowly(client, (bytes([byte]) for byte in (POST + b"x: " + b"y" * 1000) * 2))
    assert time.monotonic() - began < 10


def test_a_second_request_on_a_kept_connection_is_bounded_too(hurried):
    with connected(hurried) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert status_and_code(everything(client)) == (408, "request_timeout")


def test_large_heads_urls_and_trailers_are_refused(hurried):
    for start in (b"GET /health HTTP/1.1\r\nx: ", b"GET /"):
        with connected(hurried) as client:
            client.sendall(start + b"y" * 10_000)
            assert status_and_code(everything(client)) == (431, "request_too_large")
    with connected(hurried) as client:
        client.sendall(POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n" + b"x: yyyyyyyy\r\n" * 2000)
        assert b"431" in everything(client)


def test_what_is_no_http_is_told_in_our_shape(hurried):
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with connected(hurried) as client:
            client.sendall(nonsense)
            assert status_and_code(everything(client)) == (400, "invalid_http")


@pytest.mark.parametrize(
    "smuggled",
    [
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"content-length: -3\r\n\r\nabc",
        b"content-length: 3, 4\r\n\r\nabc",
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bodies_of_two_lengths_are_refused(hurried, smuggled):
    with connected(hurried) as client:
        client.sendall(POST + smuggled)
        assert b" 400 " in everything(client).split(b"\r\n")[0]


def test_an_endless_body_is_answered_and_cut_off(hurried):
    with connected(hurried) as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        began = time.monotonic()
        with pytest.raises(CLOSED):
            send_slowly(client, itertools.repeat(b"400\r\n" + b"x" * 1024 + b"\r\n", 20_000))
    assert time.monotonic() - began < 10


def test_a_body_slower_than_the_least_rate_is_ended(deploy, monkeypatch):
    defaults = BodyLimits.__init__.__kwdefaults__
    monkeypatch.setattr(BodyLimits.__init__, "__kwdefaults__", {**defaults, "chunk_gap_s": 0.3, "bytes_per_s": 1000.0})
    server = deploy()
    began = time.monotonic()
    with connected(server) as client:
        client.sendall(POST + b"content-length: 100000\r\n\r\n{")
        client.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - began < 15:
            client.sendall(b" ")
            try:
                answer = client.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_an_answer_that_nobody_reads_is_given_up(hurried):
    body = json.dumps({"prompt": "x", "size": "1024x1024", "n": 10}).encode()
    with connected(hurried) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: [row[1] for row in hurried.rows()] == ["completed"] * 10, 60)
        time.sleep(1.5)
        head, _, received = everything(client).partition(b"\r\n\r\n")
    announced = int(re.search(rb"content-length: (\d+)", head).group(1))
    # What was on its way is there, the rest of it is not.
    assert announced > 1_000_000
    assert len(received) < announced


def test_others_are_served_while_many_are_slow(deploy):
    server = deploy()
    slow = [connected(server) for _ in range(300)]
    try:
        for number, client in enumerate(slow):
            client.sendall((POST + b"content-length: 50\r\n\r\n{") if number % 2 else b"GET /hea")
        for _ in range(5):
            assert server.post(json={"prompt": "a cube"}).status_code == 200
    finally:
        for client in slow:
            client.close()
