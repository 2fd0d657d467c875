"""What the leader tells the other ranks, and what they answer, over a socket pair each: length-prefixed msgpack."""

from __future__ import annotations

import socket
import struct
from typing import Generic, TypeVar

import msgspec

from ...core.parallel import Degrees
from ...core.worker_config import WorkerConfig
from .arguments import Outline

# --- to a follower


class Join(msgspec.Struct, frozen=True, tag="join"):
    """The first order: load what all ranks run and meet the others through `meeting_file`."""

    config: WorkerConfig
    degrees: Degrees
    rank: int
    device: str
    meeting_file: str


class RunCall(msgspec.Struct, frozen=True, tag="run"):
    """Run a network's method with the other ranks of the CFG group, or with all; its tensors follow by broadcast."""

    number: int
    module: str
    method: str
    arguments: Outline
    autocast: str | None  # the precision of the leader's autocast, where it has one
    cache_context: str | None = None  # under which a step cache keeps this call's state
    by_all: bool = False  # whether the ranks of all CFG groups run it together
    answers: bool = False  # whether the first rank of the group sends the result to the leader


class SetWeights(msgspec.Struct, frozen=True, tag="weights"):
    """Take over these parameters of a denoiser; their values follow by broadcast, in this order."""

    module: str
    parameters: tuple[str, ...]


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Drop what a denoiser's step cache keeps for a job."""

    module: str
    owner: str


def shape_of(order: RunCall) -> bytes:
    """Return what determines the shape of everything inside a call: all of its arguments but the tensors' content."""
    return f"{order.module}.{order.method} ".encode() + msgspec.msgpack.encode(order.arguments)


Order = Join | RunCall | SetWeights | Forget

# --- from a follower


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """All is on the device; None, or why it is not."""

    error: str | None


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """A call is over here; `error` says why it failed. The tensors of a `result` follow, to the leader alone."""

    number: int
    error: str | None
    result: Outline | None = None


Reply = Loaded | Outcome

_LENGTH = struct.Struct("<I")
M = TypeVar("M")


class Link(Generic[M]):
    """One end of a socket pair: sends anything, receives messages of one union."""

    def __init__(self, connection: socket.socket, receives: type[M]) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: Order | Reply) -> None:
        body = msgspec.msgpack.encode(message)
        self._connection.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> M | None:
        """Wait for a message; None when the other end is gone."""
        try:
            header = self._stream.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                return None
            return self._decoder.decode(self._stream.read(_LENGTH.unpack(header)[0]))
        except OSError:
            return None
