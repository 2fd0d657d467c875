"""The worker's process: connects to the host, loads the model, and turns until told to stop.

A thread takes messages off the socket, so that a cancel is seen between two calls, and another reads LoRA files. On a
GPU one runs encoders and decoders beside the steps, and one takes frames to where the host finds them. All else happens
in the main thread. When the host is gone the process ends: its jobs are the host's to give again.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from functools import partial
from typing import NoReturn

import torch

from ..core.errors import ConfigError
from ..core.messages import (
    Cancel,
    Fatal,
    Load,
    LoadFailed,
    Loading,
    PrepareLoras,
    Ready,
    SetLoras,
    Shutdown,
    Submit,
    ToHost,
    ToWorker,
)
from ..core.wire import HEADER_BYTES, body_length, pack, to_worker
from ..core.worker_config import WorkerConfig
from .loading import load
from .memory import DeviceLost, limit_memory
from .process import configure_logging
from .warmup import warm_up
from .worker import Worker

logger = logging.getLogger("photogram.worker")

EXIT_DEVICE_LOST = 70


class Woken:
    """Stands in the inbox for the worker's own threads."""


class HostLink:
    """The socket to the host. Messages arrive in `inbox`; None there says that the host is gone.

    `Woken` is no message: something was done beside the loop, which may be waiting at the inbox.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.inbox: queue.SimpleQueue[ToWorker | Woken | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="host-link", daemon=True).start()

    def send(self, message: ToHost) -> None:
        with self._sending:
            self._connection.sendall(pack(message))

    def wake(self) -> None:
        self.inbox.put(Woken())

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while header := stream.read(HEADER_BYTES):
                    self.inbox.put(to_worker.decode(stream.read(body_length(header))))
        except (OSError, ValueError):
            logger.exception("the link to the host broke")
        self.inbox.put(None)


def main(arguments: list[str]) -> int:
    """Serve the host at the socket path given; return the exit code."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(arguments[0])
    link = HostLink(connection)
    first = link.inbox.get()
    if not isinstance(first, Load):
        return 1
    configure_logging(first.config, "worker")
    try:
        return serve(first.config, link)
    except ConfigError as error:
        link.send(LoadFailed(str(error)))
        return 2
    except DeviceLost as error:
        logger.critical("the device is lost: %s", error)
        link.send(Fatal(str(error)))
        return EXIT_DEVICE_LOST


def serve(config: WorkerConfig, link: HostLink) -> int:
    """Load, warm up, and run jobs until the host says stop or is gone."""
    with torch.inference_mode():
        served = load(config, lambda stage: link.send(Loading(stage)), partial(_end_at_once, link))
        if config.memory_limit_bytes is not None and served.device.type == "cpu":
            limit_memory(config.memory_limit_bytes)
        worker = Worker(served, config, link.send, time.monotonic, link.wake)
        if config.warmup:
            link.send(Loading("warming up"))
            warm_up(worker)
        link.send(Ready(served.card))
        busy = False
        while True:
            # Waits only when there is nothing to do.
            while not busy or not link.inbox.empty():
                match link.inbox.get():
                    case None | Shutdown():
                        return 0
                    case Submit(request=request):
                        worker.submit(request)
                    case Cancel(job_id=job_id):
                        worker.cancel(job_id)
                    case SetLoras() | PrepareLoras() as message:
                        worker.set_loras(message)
                    case Woken():
                        pass  # the turn will see
                busy = True
            busy = worker.turn()


def _end_at_once(link: HostLink, reason: str) -> NoReturn:
    """End the process whatever its main thread waits for: a rank is gone, and with it every call in progress."""
    logger.critical("the group of ranks is lost: %s", reason)
    link.send(Fatal(reason))
    os._exit(EXIT_DEVICE_LOST)
