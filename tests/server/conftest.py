"""A real server on a real port, in a thread of the test process, over an engine without a worker."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from photogram.core.config import ServeConfig
from photogram.server.run import serve

from .fake_engine import FakeEngine


class Deployment:
    """One running server: its URL, its engine, its data folder."""

    def __init__(self, config: ServeConfig, make_engine: Callable[[Path], FakeEngine]) -> None:
        self.config = config
        self.engine: FakeEngine
        self.url = ""
        self.error: BaseException | None = None
        self._listening = threading.Event()
        self._make_engine = make_engine
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(20)
        while self._is_starting():
            time.sleep(0.01)
        if self.error is not None:
            raise self.error

    def _is_starting(self) -> bool:
        try:
            return self.error is None and "The server is starting." in self.get("/models").text
        except httpx.TransportError:
            return self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._main())

    async def _main(self) -> None:
        def make_engine(config: ServeConfig, frames_dir: Path) -> FakeEngine:
            self.engine = self._make_engine(frames_dir)
            return self.engine

        def on_listening(url: str) -> None:
            self.url = url
            self._listening.set()

        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        try:
            await serve(self.config, make_engine, on_listening=on_listening)
        except Exception as error:
            self.error = error
        finally:
            self._listening.set()

    def stop(self) -> None:
        if self._thread.is_alive():
            assert self.task is not None
            self.engine.released.set()
            self.loop.call_soon_threadsafe(self.task.cancel)
            self._thread.join(20)
            assert not self._thread.is_alive()

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def post(self, path: str = "/v1/images/generations", **options) -> httpx.Response:
        return httpx.post(self.url + path, timeout=20, **options)

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{**self._client_defaults(), **options})

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**{**self._client_defaults(), **options})

    def _client_defaults(self) -> dict[str, object]:
        base_url = f"{self.url}/v1"
        return {"api_key": "sk-any", "base_url": base_url, "max_retries": 0, "_strict_response_validation": True}

    def rows(self) -> list[tuple[str, str, str | None]]:
        """(id, state, error code) of every job in the store's file, oldest first."""
        path = Path(self.config.data_dir) / "jobs.sqlite3"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return connection.execute("select job_id, state, error_code from jobs order by position").fetchall()

    def leftover_frames(self) -> list[Path]:
        return list(self.engine.frames_dir.iterdir())


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path) -> Iterator[Deploy]:
    """Start a server with settings; `card` and `state` are the fake engine's."""
    running: list[Deployment] = []

    def start(*, card=None, state="ready", **settings) -> Deployment:
        config = ServeConfig(
            **{"port": 0, "data_dir": str(tmp_path / "data"), "model_path": "/models/painter", **settings}
        )
        running.append(Deployment(config, lambda frames_dir: FakeEngine(frames_dir, card, state)))
        return running[-1]

    yield start
    for deployment in running:
        deployment.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Deployment]:
    """One server with default settings, shared by the tests of a module that leave nothing behind."""
    config = ServeConfig(port=0, data_dir=str(tmp_path_factory.mktemp("data")), model_path="/models/painter")
    deployment = Deployment(config, FakeEngine)
    yield deployment
    deployment.stop()
