"""Webhooks: real receivers on real ports, verified by the official SDK."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import threading
import time
from collections.abc import Iterator, Sequence

import openai
import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.jobs.outbox import Outbox
from photogram.net.client import Outbound
from photogram.server.webhooks import Webhooks

from .clips import Running, server

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver:
    """Answers with the statuses given, then with 200; a number below 100 is seconds of silence before the 200."""

    def __init__(self, statuses: Sequence[int], port: int = 0, location: str = "") -> None:
        self.heard: list[tuple[bytes, dict[str, str]]] = []
        waiting = list(statuses)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["content-length"]))
                self.heard.append((body, {name.lower(): value for name, value in handler.headers.items()}))
                status = waiting.pop(0) if waiting else 200
                if status < 100:
                    time.sleep(status)
                with contextlib.suppress(OSError):
                    handler.send_response(200 if status < 100 else status)
                    if location:
                        handler.send_header("location", location)
                    handler.send_header("content-length", "0")
                    handler.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook?for=clips"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def receiver(*statuses: int, **options) -> Iterator[Receiver]:
    running = Receiver(statuses, **options)
    try:
        yield running
    finally:
        running.close()


@contextlib.asynccontextmanager
async def telling(running: Running, *allowed: str, pauses_s=(0.05,) * 6, timeout_s: float = 5.0):
    outbound = Outbound(allowed)
    webhooks = Webhooks(Outbox(running.store), outbound, KEY, pauses_s=pauses_s, timeout_s=timeout_s)
    task = asyncio.create_task(webhooks.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await outbound.close()


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


async def outbox(running: Running) -> list[tuple[str, int, str | None]]:
    def read(connection):
        rows = connection.exec_driver_sql("SELECT state, attempts, last_error FROM deliveries ORDER BY position")
        return [tuple(row) for row in rows]

    return await running.store.transact(read)


def run(story, folder, **settings) -> None:
    async def main():
        async with server(folder, **settings) as running:
            await story(running)

    asyncio.run(main())


def event_of(heard: tuple[bytes, dict[str, str]]):
    """What the official SDK makes of a request; it raises where the signature is not right."""
    body, headers = heard
    return openai.OpenAI(api_key="sk-any", webhook_secret=SECRET).webhooks.unwrap(body, headers)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("a cube", "video.completed"), ("fail:out_of_memory", "video.failed"), ("hold", "video.failed")],
)
def test_the_end_of_a_clip_is_told_as_the_official_sdk_verifies_it(tmp_path, prompt, kind):
    async def story(running):
        with receiver() as told:
            async with telling(running, f"127.0.0.1:{told.port}"):
                job_id = await running.begin(prompt, webhook_url=told.url)
                if prompt == "hold":
                    await running.until_state(job_id, "running")
                    await running.service.cancel(job_id)
                await until(lambda: told.heard)
                event = event_of(told.heard[0])
                assert (event.type, event.data.id) == (kind, job_id)
                assert event.object == "event"
                assert event.id == told.heard[0][1]["webhook-id"]
                with pytest.raises(openai.InvalidWebhookSignatureError):
                    event_of((told.heard[0][0] + b" ", told.heard[0][1]))
                await asyncio.sleep(0.1)
                assert len(told.heard) == 1
                assert await outbox(running) == []

    run(story, tmp_path)


def test_the_webhook_of_the_server_is_told_where_the_request_names_none(tmp_path):
    with receiver() as told:

        async def story(running):
            async with telling(running, f"127.0.0.1:{told.port}"):
                job_id = await running.begin("a cube")
                await until(lambda: told.heard)
                assert event_of(told.heard[0]).data.id == job_id

        run(story, tmp_path, webhook_url=told.url)


def test_a_receiver_that_fails_is_told_again_with_the_same_id(tmp_path):
    async def story(running):
        with receiver(500, 503, 404) as told:
            async with telling(running, f"127.0.0.1:{told.port}"):
                await running.begin("a cube", webhook_url=told.url)
                await until(lambda: len(told.heard) == 4)
                assert len({event_of(heard).id for heard in told.heard}) == 1
                assert len({heard[0] for heard in told.heard}) == 1

    run(story, tmp_path)


def test_a_receiver_that_is_down_is_told_when_it_is_back_even_after_a_restart(tmp_path):
    with receiver() as found:
        port = found.port

    async def while_down(running):
        async with telling(running, f"127.0.0.1:{port}", pauses_s=(0.05,) * 100):
            await running.begin("a cube", webhook_url=f"http://127.0.0.1:{port}/hook")
            await running.service.wait_idle()
            while not (await outbox(running) or [("", 0, "")])[0][1]:
                await asyncio.sleep(0.01)

    async def when_back(running):
        with receiver(port=port) as told:
            async with telling(running, f"127.0.0.1:{port}"):
                await until(lambda: told.heard)
                assert event_of(told.heard[0]).type == "video.completed"

    run(while_down, tmp_path)
    run(when_back, tmp_path)


def test_a_receiver_that_is_slow_holds_up_nobody_and_is_told_again(tmp_path):
    async def story(running):
        with receiver(2) as slow, receiver() as quick:
            hosts = [f"127.0.0.1:{each.port}" for each in (slow, quick)]
            async with telling(running, *hosts, timeout_s=1.5):
                await running.begin("a cube", webhook_url=slow.url)
                await until(lambda: slow.heard)
                await running.begin("a ball", webhook_url=quick.url)
                await until(lambda: quick.heard)
                assert len(slow.heard) == 1
                await until(lambda: len(slow.heard) == 2)
                assert event_of(slow.heard[0]).id == event_of(slow.heard[1]).id

    run(story, tmp_path)


def test_an_event_that_never_arrives_is_given_up_and_stays_to_be_seen(tmp_path, caplog):
    async def story(running):
        with receiver(*[500] * 10) as told:
            async with telling(running, f"127.0.0.1:{told.port}", pauses_s=(0.02, 0.02)):
                await running.begin("a cube", webhook_url=told.url)
                while [row[0] for row in await outbox(running)] != ["dead"]:
                    await asyncio.sleep(0.01)
                assert await outbox(running) == [("dead", 3, "the webhook answered 500")]
                await asyncio.sleep(0.1)
                assert len(told.heard) == 3

    run(story, tmp_path)
    assert "given up after 3 tries" in caplog.text


def test_an_address_of_this_network_is_not_told_directly_nor_by_a_redirect(tmp_path):
    async def story(running):
        with receiver() as private, receiver(*[302] * 9, location=private.url) as redirecting:
            async with telling(running, f"127.0.0.1:{redirecting.port}", pauses_s=(0.02,)):
                await running.begin("a cube", webhook_url=private.url)
                await running.begin("a cube", webhook_url=redirecting.url)
                while [row[0] for row in await outbox(running)] != ["dead", "dead"]:
                    await asyncio.sleep(0.01)
            assert private.heard == []
            assert len(redirecting.heard) == 2

    run(story, tmp_path)


def test_a_deleted_clip_that_was_not_finished_is_not_told_of(tmp_path):
    async def story(running):
        with receiver() as told:
            async with telling(running, f"127.0.0.1:{told.port}"):
                job_id = await running.begin("hold", webhook_url=told.url)
                await running.until_state(job_id, "running")
                await running.service.delete(job_id)
                await asyncio.sleep(0.1)
                assert await outbox(running) == []
                assert told.heard == []

    run(story, tmp_path)


@pytest.mark.parametrize("secret", ["", "secret", "whsec_", "whsec_!!", "whsec_c2hvcnQ="])
def test_a_secret_that_is_none_is_refused_and_not_repeated(secret):
    with pytest.raises(ConfigError, match="--webhook-secret: must be") as refused:
        ServeConfig(webhook_secret=secret)
    assert "c2hvcnQ" not in str(refused.value)
