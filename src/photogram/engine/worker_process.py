"""One worker process and the socket to it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.messages import ToHost, ToWorker
from ..core.wire import HEADER_BYTES, body_length, pack, to_host

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "photogram.worker")
CONNECT_TIMEOUT_S = 120.0

# OpenMP's threads spin at the end of every operation by default: with one other busy process on two cores a picture
# took 20 s that takes 0.8 s when they sleep instead.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class WorkerProcess:
    """Started by `start`, over when `run` returns.

    The socket lies in a folder that only this user can enter and is gone once the worker has connected.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, kernels: Path, command: Sequence[str] = WORKER_COMMAND) -> WorkerProcess:
        """Start `command` with the socket's path and wait for its connection. Raises OSError when none comes.

        `kernels` is the folder for what it compiles.
        """
        accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if accepted.done():
                writer.close()
            else:
                accepted.set_result((reader, writer))

        with tempfile.TemporaryDirectory(prefix="photogram-") as folder:
            path = Path(folder) / "worker.sock"
            server = await asyncio.start_unix_server(accept, path)
            # A session of its own: Ctrl-C in a terminal is for the host, which lets running jobs finish.
            process = await asyncio.create_subprocess_exec(
                *command,
                str(path),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                env=WORKER_ENVIRONMENT | kept_in(kernels) | dict(os.environ),
            )
            ended = asyncio.ensure_future(process.wait())
            try:
                first: set[asyncio.Future[Any]] = {accepted, ended}
                await asyncio.wait(first, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                if not accepted.done():
                    if process.returncode is None:
                        process.kill()
                    raise OSError(f"the worker did not connect (exit code {await ended})")
            finally:
                ended.cancel()
                server.close()
        return cls(process, *accepted.result())

    def send(self, message: ToWorker) -> None:
        """Queue a message; one to a worker that is gone is dropped (its end is heard of by `run`)."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def run(self, hear: Callable[[ToHost], None]) -> int:
        """Give every message to `hear` until the worker ends; return its exit code (negative: the signal)."""
        try:
            while True:
                header = await self._reader.readexactly(HEADER_BYTES)
                hear(to_host.decode(await self._reader.readexactly(body_length(header))))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except ValueError:
            logger.exception("worker %d sent what is no message", self.pid)
            self.kill()
        self._writer.close()
        return await self._process.wait()

    def kill(self) -> None:
        """End the process and all it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    async def wait(self, timeout_s: float) -> None:
        """Wait for the end; kill after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()


def kept_in(kernels: Path) -> dict[str, str]:
    """Where torch, Triton and the driver, which name what they keep by versions, device and code, are to keep compiled
    kernels; and Triton what it found to be the fastest of several, so that the next start has the same bits.

    They read it while they are loaded.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
        "TRITON_CACHE_DIR": str(kernels / "triton"),
        "TRITON_CACHE_AUTOTUNING": "1",
        "CUDA_CACHE_PATH": str(kernels / "cuda"),
    }
