"""The host's side of decoding pictures and clips of strangers: a warm process that forks for each (`media/decoder`)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from ..core.errors import EngineLost, RequestError, StorageFailed
from .clips import ClipFacts
from .decoder import MAX_MESSAGE, ClipForm, Decoded, Order, OrderKind, Outcome

log = logging.getLogger(__name__)

CPU_S = 20
WALL_S = 60
CLIP_CPU_S = 120
CLIP_WALL_S = 240
_MARGIN_BYTES = 256 << 20
# Decoding, turning, colours and transparency have up to seven copies at a time, of four bytes a pixel.
_BYTES_PER_PIXEL = 40
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class DecoderPool:
    """Decodes pictures and clips within bounds. One per server; lives on the event loop.

    `num_at_once` of them are decoded side by side, the others wait. The process is started by the first picture, or
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
        decoded = await self._decode(self._order("picture", what, param), source, target)
        assert isinstance(decoded, Decoded)
        return decoded.width, decoded.height

    async def mask(self, source: IO[bytes], target: Path, like: tuple[int, int]) -> None:
        """Write a mask to `target` as a grey PNG file, 255 where the picture of size `like` is to be edited."""
        await self._decode(msgspec.structs.replace(self._order("mask", "mask", "mask"), like=like), source, target)

    async def probe(self, source: IO[bytes], what: str, param: str, *, max_pixels: int) -> ClipFacts:
        """Return what a clip is; `max_pixels` bounds its frames. Raises RequestError for what is no clip."""
        order = self._order("probe", what, param)
        facts = await self._decode(msgspec.structs.replace(order, max_pixels=max_pixels), source, None)
        assert isinstance(facts, ClipFacts)
        return facts

    async def clip(
        self, source: IO[bytes], target: Path, what: str, param: str, *, max_pixels: int, form: ClipForm
    ) -> None:
        """Write a clip's beginning to `target` as `GenerateRequest.video` has it. Raises as `picture`."""
        await self._clip("clip", source, target, what, param, max_pixels, form, form.size_bytes)

    async def sound(
        self, source: IO[bytes], target: Path, what: str, param: str, *, max_pixels: int, form: ClipForm
    ) -> None:
        """Write the sound of a clip's beginning to `target` as `OutputSpec.continues_sound` has it.

        Raises as `picture`.
        """
        await self._clip("sound", source, target, what, param, max_pixels, form, form.sound_bytes)

    async def _clip(
        self,
        kind: OrderKind,
        source: IO[bytes],
        target: Path,
        what: str,
        param: str,
        max_pixels: int,
        form: ClipForm,
        size_bytes: int,
    ) -> None:
        order = msgspec.structs.replace(
            self._order(kind, what, param),
            max_pixels=max_pixels,
            form=form,
            file_bytes=size_bytes + _MARGIN_BYTES,
            cpu_s=CLIP_CPU_S,
            wall_s=CLIP_WALL_S,
        )
        await self._decode(order, source, target)

    async def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def _order(self, kind: OrderKind, what: str, param: str) -> Order:
        memory_bytes = _MARGIN_BYTES + _BYTES_PER_PIXEL * self._max_pixels
        return Order(
            kind=kind,
            what=what,
            param=param,
            max_pixels=self._max_pixels,
            memory_bytes=memory_bytes,
            file_bytes=memory_bytes,
            cpu_s=self._cpu_s,
            wall_s=self._wall_s,
        )

    async def _decode(self, order: Order, source: IO[bytes], target: Path | None) -> Decoded | ClipFacts:
        try:
            async with self._slots:
                outcome = await self._carried_out(order, source, target)
            if isinstance(outcome, Decoded | ClipFacts):
                return outcome
        except BaseException:
            _remove(target)
            raise
        _remove(target)
        if outcome is None:
            # It passed a bound, or it broke a decoder: either way nobody needs to know which.
            raise RequestError(
                f"{order.what}: could not be decoded within {order.cpu_s} s and {order.memory_bytes >> 20} MiB.",
                param=order.param,
                code="invalid_image" if order.kind in ("picture", "mask") else "invalid_video",
            )
        if outcome.is_storage:
            raise StorageFailed(outcome.message)
        raise RequestError(outcome.message, param=order.param, code=outcome.code)

    async def _carried_out(self, order: Order, source: IO[bytes], target: Path | None) -> Outcome | None:
        """Send an order and wait for its outcome; None when the fork ended without one."""
        try:
            if target is None:
                written = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            else:
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
            return await self._outcome(ours, order.wall_s)

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

    async def _outcome(self, reply: socket.socket, wall_s: int) -> Outcome | None:
        loop = asyncio.get_running_loop()
        text = b""
        try:
            # The fork is ended by the system at `wall_s`; this is for a process that never forked.
            async with asyncio.timeout(wall_s + 10):
                while chunk := await loop.sock_recv(reply, MAX_MESSAGE):
                    text += chunk
        except TimeoutError:
            log.error("the decoder does not answer and is started again")
            self._stop()
            return None
        return msgspec.json.decode(text, type=Outcome) if text else None


def _remove(target: Path | None) -> None:
    if target is not None:
        target.unlink(missing_ok=True)
