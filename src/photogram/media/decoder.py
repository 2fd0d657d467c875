"""`python -m photogram.media.decoder FD`: decodes pictures and clips of strangers, each in a process of its own.

It stays warm and forks for every one. A fork has limits on memory, processor time, file size and time, is killed by
the system when it passes one, takes its input and gives its output through descriptors that came with the order, and
ends with its picture: nothing that one picture does to it can touch the next one.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import IO, Literal

import msgspec
from PIL import Image

from ..core.errors import RequestError, ServiceError, StorageFailed
from .clips import ClipFacts, probe_clip, write_frames, write_sound
from .inputs import read_mask, read_picture
from .sound import KEPT_CHANNELS, KEPT_RATE

MAX_MESSAGE = 64 << 10


OrderKind = Literal["picture", "mask", "probe", "clip", "sound"]


class ClipForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a clip is to be written: pixels, frames, and frames a second."""

    width: int
    height: int
    num_frames: int
    fps: int

    @property
    def size_bytes(self) -> int:
        return self.width * self.height * 3 * self.num_frames

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def sound_bytes(self) -> int:
        return round(self.seconds * KEPT_RATE) * KEPT_CHANNELS * 4


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One picture or clip to decode; with it come three descriptors: the source, the file to write, and for the answer.

    A picture and a mask are written as PNG, a clip as `form` says (`clips.write_frames`), its sound as long as `form`
    is (`clips.write_sound`), and for a probe nothing is. `what` and `param` name it in errors. A mask must have the
    size `like`.
    """

    kind: OrderKind
    what: str
    param: str
    max_pixels: int
    like: tuple[int, int] | None = None
    form: ClipForm | None = None
    memory_bytes: int
    file_bytes: int
    cpu_s: int
    wall_s: int


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """What was written: its size in pixels."""

    width: int
    height: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """`is_storage`: the picture was fine, and its copy could not be written."""

    message: str
    code: str
    is_storage: bool = False


Outcome = Decoded | ClipFacts | Refused


def main(descriptor: int) -> int:
    """Carry out orders until the other end closes."""
    control = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the socket
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks need no reaping
    Image.preinit()
    Image.MAX_IMAGE_PIXELS = None  # the order has the operator's own bound
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 3)
        if not text:
            return 0
        if os.fork() == 0:
            try:
                control.close()
                _carry_out(msgspec.json.decode(text, type=Order), *descriptors)
            finally:
                os._exit(0)
        for given in descriptors:
            os.close(given)


def _carry_out(order: Order, source: int, target: int, answer: int) -> None:
    _limit(order)
    with os.fdopen(source, "rb") as read, os.fdopen(target, "wb") as written, socket.socket(fileno=answer) as reply:
        read.seek(0)
        if order.kind != "probe":  # the second try of an order finds what the first one wrote
            written.truncate(0)
            written.seek(0)
        try:
            outcome: Outcome = _decode(order, read, written)
        except ServiceError as error:
            outcome = Refused(error.message, error.code, is_storage=isinstance(error, StorageFailed))
        reply.sendall(msgspec.json.encode(outcome))


def _limit(order: Order) -> None:
    """Bound what this process may take from here on. Beyond a bound it is killed or refused memory."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(order.wall_s)
    resource.setrlimit(resource.RLIMIT_CPU, (order.cpu_s, order.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere the bound on addresses does not hold anyway
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = taken + order.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _decode(order: Order, source: IO[bytes], target: IO[bytes]) -> Decoded | ClipFacts:
    if order.kind == "probe":
        return probe_clip(source, order.what, max_pixels=order.max_pixels, param=order.param)
    try:
        if order.kind in ("clip", "sound"):
            return _decode_clip(order, source, target)
        return _decode_picture(order, source, target)
    except MemoryError:
        raise RequestError(f"{order.what}: takes too much memory.", code="invalid_image") from None
    except OSError as error:
        raise StorageFailed(f"{order.what}: its copy could not be written: {error.strerror}.") from error


def _decode_clip(order: Order, source: IO[bytes], target: IO[bytes]) -> Decoded:
    form = order.form
    assert form is not None
    if order.kind == "sound":
        write_sound(source, order.what, target, seconds=form.seconds, param=order.param)
    else:
        write_frames(
            source,
            order.what,
            target,
            width=form.width,
            height=form.height,
            fps=form.fps,
            num_frames=form.num_frames,
            max_pixels=order.max_pixels,
            param=order.param,
        )
    target.flush()
    os.fsync(target.fileno())
    return Decoded(form.width, form.height)


def _decode_picture(order: Order, source: IO[bytes], target: IO[bytes]) -> Decoded:
    if order.kind == "mask":
        assert order.like is not None
        picture = read_mask(source, order.like, max_pixels=order.max_pixels)
    else:
        picture = read_picture(source, order.what, max_pixels=order.max_pixels, param=order.param)
    picture.info.clear()  # nothing of the original but its pixels
    picture.save(target, "PNG", compress_level=1)
    target.flush()
    os.fsync(target.fileno())
    return Decoded(*picture.size)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
