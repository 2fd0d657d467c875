"""The worker's process: connects to the host, loads the model, and turns until told to stop.

A reader thread takes messages off the socket, so that a cancel is seen between two calls; everything else happens
in the main thread. When the host is gone the process ends: its jobs are the host's to give again.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import signal
import socket
import sys
import threading
import time

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from ..core.config import WorkerConfig
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
from .loading import load
from .memory import DeviceLost, limit_memory
from .warmup import warm_up
from .worker import Worker

logger = logging.getLogger("photogram.worker")

EXIT_DEVICE_LOST = 70


class HostLink:
    """The socket to the host. Messages arrive in `inbox`; None there says that the host is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="host-link", daemon=True).start()

    def send(self, message: ToHost) -> None:
        with self._sending:
            self._connection.sendall(pack(message))

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
    _end_with_parent()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(arguments[0])
    link = HostLink(connection)
    first = link.inbox.get()
    if not isinstance(first, Load):
        return 1
    _configure_logging(first.config)
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
        served = load(config, lambda stage: link.send(Loading(stage)))
        if config.memory_limit_bytes is not None and served.device.type == "cpu":
            limit_memory(config.memory_limit_bytes)
        worker = Worker(served, config, link.send, time.monotonic)
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
                busy = True
            busy = worker.turn()


def _end_with_parent() -> None:
    """Ask the kernel to kill this process when the host dies: in mid-call the closed socket would not be seen."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _configure_logging(config: WorkerConfig) -> None:
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)-7s worker %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("huggingface_hub", "httpx", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Progress bars and notices of libraries would run through the host's log.
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    hub.disable_progress_bars()
