"""`photogram serve` as one coroutine: builds the host's parts, listens, and ends in good order.

The port is bound before anything else, and `/health` is answered before the rest is even imported.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.card import ModelCard
from ..core.config import ServeConfig, parse_keep, webhook_key
from ..core.errors import ConfigError, EngineLost, RequestError
from ..core.quality_mode import describe_mode
from ..engine import Engine
from .answers import json_answer
from .connection import Connection
from .problems import answer

if TYPE_CHECKING:
    from ..storage import Storage
    from .loras import Loras
    from .service import Service
    from .webhooks import Webhooks

log = logging.getLogger(__name__)

EngineFactory = Callable[[ServeConfig, Path], Engine]
"""Makes the engine from the settings and the folder for its frames."""

_LAST_ANSWERS_S = 10


async def serve(
    config: ServeConfig,
    make_engine: EngineFactory,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[ModelCard], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; the second one does not wait for running jobs.

    `on_listening` is told the server's URL once it answers, `on_ready` the card once the model is loaded. Raises
    ConfigError when the port is taken, when the data folder cannot be used and when the model can never be served.
    """
    listener = bind(config.host, config.port)
    front = _Front()
    server = _Server(
        uvicorn.Config(
            front,
            http=Connection,
            log_config=None,
            access_log=config.log_level == "debug",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
    )
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    host: _Host | None = None
    try:
        await _until_started(server, listening)
        log.info(
            "quality mode of requests that name none: %s (%s)", config.quality_mode, describe_mode(config.quality_mode)
        )
        if on_listening is not None:
            on_listening(url_of(listener))
        host = await _Host.build(config, make_engine)
        front.app = host.app
        await _serve_until_told(server, listening, host, on_ready, config.drain_seconds)
    finally:
        if host is not None:
            await host.end_jobs()
        server.should_exit = True
        await listening
        listener.close()
        if host is not None:
            await host.close()


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError when the port is in use or the address is not ours."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"--host '{host}': {error.strerror}.") from error
    # Named outright, because asyncio sends small writes at once (TCP_NODELAY) only where it is: otherwise the second
    # part of an answer waits 40 ms for the client's acknowledgement of the first.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use; choose another with --port.") from error
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror}).") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class _Front:
    """What answers first: life at once, everything else once the app is there."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            if scope["path"].rstrip("/") in ("/health", "/v1/health", "/liveness", "/v1/liveness"):
                await json_answer({"status": "ok"})(scope, receive, send)
            else:
                await answer(EngineLost("The server is starting.", code="starting", retry_after_s=1))(
                    scope, receive, send
                )


class _Server(uvicorn.Server):
    """uvicorn, but a signal asks us first: it would refuse connections while we still want to answer 503."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told_to_stop = asyncio.Event()
        self.told_again = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not handed to uvicorn, which would raise the signal again at its end, and the exit code would not be 0.
        told = self.told_again if self.told_to_stop.is_set() else self.told_to_stop
        self._loop.call_soon_threadsafe(told.set)


class _Host:
    """The parts of the host, in the order in which they are built and closed."""

    def __init__(
        self, config: ServeConfig, data: _Data, engine: Engine, service: Service, loras: Loras, app: ASGIApp
    ) -> None:
        self.engine = engine
        self.service = service
        self.app = app
        self._loras = loras
        self._data = data
        self._tasks = [
            asyncio.create_task(data.keep_pruning(config)),
            asyncio.create_task(data.uploads.keep_sweeping()),
            asyncio.create_task(data.webhooks(config).run()),
        ]

    @staticmethod
    async def build(config: ServeConfig, make_engine: EngineFactory) -> _Host:
        data = await asyncio.to_thread(_Data, config)
        try:
            await data.recover()
            await data.uploads.open()
            await data.storage.start()
            host = _wire(config, data, make_engine)
        except BaseException:
            await data.close()
            raise
        try:
            await host._loras.find_first()
        except BaseException:
            await host.close()
            raise
        return host

    async def wait_ready(self) -> ModelCard:
        """Wait until requests run as configured. Raises ConfigError when they never will."""
        card = await self.engine.wait_ready()
        await self._loras.set_first(card)
        return card

    async def end_jobs(self) -> None:
        """End what still runs, so that every client gets its answer."""
        self.service.drain()
        if self.engine.status.state != "stopped":
            await self.engine.stop(0)
        await self.service.end()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._data.close()


class _Data:
    """What lies on disks: store, files, frames. Built in a thread, for opening a database takes its time."""

    def __init__(self, config: ServeConfig) -> None:
        from ..engine.frames_folder import frames_folder
        from ..jobs.inputs import INPUTS, InputFolders
        from ..jobs.store import open_store
        from ..jobs.uploads import UploadStore
        from ..media.decoder_pool import DecoderPool
        from ..media.pool import MediaPool
        from ..net.client import Outbound
        from ..storage.local import LocalStorage
        from .uploads import Uploads

        self.outbound = Outbound(config.allow_url_host)
        if config.webhook_url is not None:
            try:
                self.outbound.check(config.webhook_url, "webhook_url")
            except RequestError as error:
                raise ConfigError(f"--webhook-url: {error.message}") from error
        self.inputs = InputFolders(config.data_path / INPUTS)
        self.store = open_store(config.data_path)
        self.storage = _storage(config)
        self.uploads = Uploads(
            UploadStore(self.store), LocalStorage(config.data_path / "uploads"), parse_keep(config.keep_uploads)
        )
        self._folder = ExitStack()
        self.frames_dir = self._folder.enter_context(frames_folder())
        self.media = MediaPool(self.frames_dir)
        self.decoders = DecoderPool(max_pixels=config.max_pixels)
        self.decoders.start()

    async def recover(self) -> None:
        """Put in order what an earlier server left unfinished."""
        from ..jobs.recovery import recover

        await recover(self.store, self.storage, self.inputs)

    def webhooks(self, config: ServeConfig) -> Webhooks:
        from ..jobs.outbox import Outbox
        from .webhooks import Webhooks

        key = None if config.webhook_secret is None else webhook_key(config.webhook_secret)
        return Webhooks(Outbox(self.store), self.outbound, key)

    async def keep_pruning(self, config: ServeConfig) -> None:
        from ..jobs.retention import keep_pruning

        await keep_pruning(self.store, self.storage, parse_keep(config.keep))

    async def close(self) -> None:
        await asyncio.to_thread(self.media.close)
        await self.decoders.close()
        await self.outbound.close()
        await self.storage.close()
        await self.store.close()
        await asyncio.to_thread(self._folder.close)


def _storage(config: ServeConfig) -> Storage:
    from ..storage.local import LocalStorage

    local = LocalStorage(config.data_path / "files")
    if config.storage is None:
        return local
    try:
        from ..storage.object_store import ObjectStorage
    except ModuleNotFoundError as error:
        raise ConfigError(f"--storage '{config.storage}': pip install 'photogram[object-storage]' first.") from error
    return ObjectStorage(config.storage, local)


def _wire(config: ServeConfig, data: _Data, make_engine: EngineFactory) -> _Host:
    from .app import create_app
    from .auth import Keys, read_keys
    from .clip_sources import ClipSources
    from .files import open_content
    from .inputs import Intake
    from .lora_files import LoraFinder
    from .loras import Loras
    from .service import Service

    engine = make_engine(config, data.frames_dir)
    service = Service(config, engine, data.store, data.storage, data.media, data.inputs)
    keys = Keys(read_keys(config), config.admin_api_key)
    intake = Intake(
        data.inputs.root,
        data.decoders,
        data.outbound if config.fetch_urls else None,
        max_bytes=config.max_upload_mb * 1_000_000,
        open_content=partial(open_content, data.store, data.storage),
        open_file=data.uploads.open_file,
        public_url=config.public_url,
    )
    loras = Loras(config, engine, LoraFinder.of(config))
    sources = ClipSources(data.inputs.root, intake, data.decoders, data.store, data.storage, config.max_video_pixels)
    app = create_app(
        config, engine, service, loras, data.store, data.storage, keys, intake, data.uploads, data.media, sources
    )
    return _Host(config, data, engine, service, loras, app)


async def _until_started(server: _Server, listening: asyncio.Task[None]) -> None:
    while not server.started and not listening.done():
        await asyncio.sleep(0.005)


async def _serve_until_told(
    server: _Server,
    listening: asyncio.Task[None],
    host: _Host,
    on_ready: Callable[[ModelCard], None] | None,
    drain_s: float,
) -> None:
    await host.engine.start()
    await host.service.resume()
    ready = asyncio.create_task(host.wait_ready())
    told = asyncio.create_task(server.told_to_stop.wait())
    try:
        await asyncio.wait({ready, told, listening}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            card = ready.result()
            if on_ready is not None:
                on_ready(card)
        await asyncio.wait({told, listening}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (ready, told):
            task.cancel()
        await asyncio.wait({ready, told})
    if not listening.done():
        await _drain(server, host, drain_s)


async def _drain(server: _Server, host: _Host, drain_s: float) -> None:
    """Answer 503 to what comes, and let what runs finish; a second signal ends the waiting."""
    log.info("stopping: %d jobs unfinished", host.service.num_jobs)
    host.service.drain()

    async def finish() -> None:
        # The service first: a job it has admitted may be on its way to the engine, which takes none while stopping.
        with suppress(TimeoutError):
            await asyncio.wait_for(host.service.wait_idle(), drain_s)
        await host.engine.stop(0)
        await host.service.end()

    finishing, again = asyncio.create_task(finish()), asyncio.create_task(server.told_again.wait())
    try:
        await asyncio.wait({finishing, again}, return_when=asyncio.FIRST_COMPLETED)
        if finishing.done():
            finishing.result()
    finally:
        for task in (finishing, again):
            task.cancel()
        await asyncio.wait({finishing, again})
