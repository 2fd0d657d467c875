"""The host's side of decoding pictures of strangers: a warm process that forks for each (`media/decoder`)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Literal

import msgspec

from ..core.errors import EngineLost, RequestError, StorageFailed
from .decoder import MAX_MESSAGE, Decoded, Order, Outcome

log = logging.getLogger(__name__)

CPU_S = 20
WALL_S = 60
_MARGIN_BYTES = 256 << 20
# Decoding, turning, colours and transparency have up to seven copies at a time, of four bytes a pixel.
_BYTES_PER_PIXEL = 40
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class DecoderPool:
    """Decodes pictures within bounds. One per server; lives on the event loop.

    `num_at_once` pictures are decoded side by side, the others wait. The process is started by the first picture, or
    by `start`, and again when it has died.
    """

    def __init__(
        self, *, max_pixels: int, num_at_once: int | None = None, cpu_s: int = CPU_S, wall_s: int = WALL_S
    ) -> None:
        self._max_pixels = max_pixels
        self._cpu_s = cpu_s
        self._wall_s = wall_s
        self._slots = asyncio.Semaphore(num_at_once or min(4, os.cpu_count() or 1))
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process, so that the first picture does not wait for it."""
        if self._closed:
            raise EngineLost("The server is stopping; send the request again later.", code="shutting_down")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setblocking(False)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "photogram.media.decoder", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
            )
        self._control = ours

    async def picture(self, source: IO[bytes], target: Path, what: str, param: str) -> tuple[int, int]:
        """Write a picture to `target` as an RGB PNG file, upright and in sRGB, and return its width and height.

        `source` is an open file with a descriptor. When this returns the file is on the disk; when it raises it is
        gone. Raises RequestError for what is no picture or passes a bound, StorageFailed when it cannot be written.
        """
        return await self._decode("picture", source, target, what, param, None)

    async def mask(self, source: IO[bytes], target: Path, like: tuple[int, int]) -> None:
        """Write a mask to `target` as a grey PNG file, 255 where the picture of size `like` is to be edited."""
        await self._decode("mask", source, target, "mask", "mask", like)

    async def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    async def _decode(
        self,
        kind: Literal["picture", "mask"],
        source: IO[bytes],
        target: Path,
        what: str,
        param: str,
        like: tuple[int, int] | None,
    ) -> tuple[int, int]:
        order = Order(
            kind=kind,
            what=what,
            param=param,
            max_pixels=self._max_pixels,
            like=like,
            memory_bytes=_MARGIN_BYTES + _BYTES_PER_PIXEL * self._max_pixels,
            cpu_s=self._cpu_s,
            wall_s=self._wall_s,
        )
        try:
            async with self._slots:
                outcome = await self._carried_out(order, source, target)
            if isinstance(outcome, Decoded):
                return outcome.width, outcome.height
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        target.unlink(missing_ok=True)
        if outcome is None:
            # It passed a bound, or it broke a decoder: either way nobody needs to know which.
            raise RequestError(
                f"{what}: could not be decoded within {self._cpu_s} s and {order.memory_bytes >> 20} MiB.",
                param=param,
                code="invalid_image",
            )
        if outcome.is_storage:
            raise StorageFailed(outcome.message)
        raise RequestError(outcome.message, param=param, code=outcome.code)

    async def _carried_out(self, order: Order, source: IO[bytes], target: Path) -> Outcome | None:
        """Send an order and wait for its outcome; None when the fork ended without one."""
        try:
            written = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageFailed(f"The input pictures could not be kept: {error.strerror}.") from error
        try:
            source.flush()
            descriptors = [source.fileno(), written]
            outcome = await self._one_try(order, descriptors)
            if outcome is None and self._is_gone():
                # Not the fork but the process itself has died, before or after it forked.
                log.warning("the decoder of pictures is lost and started again")
                outcome = await self._one_try(order, descriptors)
                if outcome is None and self._is_gone():
                    raise EngineLost("The decoder of pictures does not start.", code="decoder_unavailable")
            return outcome
        except OSError as error:
            raise StorageFailed(f"The input pictures could not be read: {error.strerror}.") from error
        finally:
            os.close(written)

    async def _one_try(self, order: Order, descriptors: list[int]) -> Outcome | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.setblocking(False)
            with theirs:
                self._send(msgspec.json.encode(order), [*descriptors, theirs.fileno()])
            return await self._outcome(ours)

    def _send(self, text: bytes, descriptors: list[int]) -> None:
        if self._is_gone():
            self._stop()
            self.start()
        assert self._control is not None
        socket.send_fds(self._control, [text], descriptors)

    def _is_gone(self) -> bool:
        if self._control is None:
            return True
        try:
            return self._control.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def _outcome(self, reply: socket.socket) -> Outcome | None:
        loop = asyncio.get_running_loop()
        text = b""
        try:
            # The fork is ended by the system at `wall_s`; this is for a process that never forked.
            async with asyncio.timeout(self._wall_s + 10):
                while chunk := await loop.sock_recv(reply, MAX_MESSAGE):
                    text += chunk
        except TimeoutError:
            log.error("the decoder does not answer and is started again")
            self._stop()
            return None
        return msgspec.json.decode(text, type=Outcome) if text else None
