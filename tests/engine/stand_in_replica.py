"""A worker without torch, one of several, that speaks the real wire protocol.

Started as ``python -m engine.stand_in_replica FOLDER SOCKET``. What it does is told by words in prompts and by files in
the folder; what it has been told of LoRAs it writes there, a line each, into ``loras-REPLICA``.

A job is begun at once: its `Progress` has the replica as its step. It is finished at once as well, one pixel that is
the replica, unless its prompt has ``hold`` (until it is cancelled) or ``hold on REPLICA`` (there). A LoRA named
``refused by REPLICA`` is refused there; every other set counts as a switch. Where there is a file
``unservable-REPLICA`` the model cannot be served, and where there is one ``dying-REPLICA`` every start ends with the
process.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from pathlib import Path

from kills.stand_in_worker import card
from photogram.core.lora import LoraState
from photogram.core.messages import (
    Began,
    Cancel,
    DeviceMemory,
    Failed,
    Finished,
    FrameBlock,
    Load,
    LoadFailed,
    LorasReady,
    LorasRefused,
    PrepareLoras,
    Progress,
    Ready,
    SetLoras,
    Shutdown,
    Submit,
    ToHost,
    Vitals,
)
from photogram.core.request import GenerateRequest
from photogram.core.wire import HEADER_BYTES, body_length, pack, to_worker


class Replica:
    """Answers one message after the other."""

    def __init__(self, folder: Path, connection: socket.socket) -> None:
        self._folder = folder
        self._connection = connection
        self._replica = 0
        self._frames = folder
        self._num_sets = 0

    def send(self, message: ToHost) -> None:
        self._connection.sendall(pack(message))

    def hear(self, message: object) -> None:
        match message:
            case Load(config=config):
                self._replica, self._frames = config.replica, Path(config.frames_dir)
                if (self._folder / f"dying-{self._replica}").exists():
                    os._exit(1)
                if (self._folder / f"unservable-{self._replica}").exists():
                    self.send(LoadFailed("it is broken"))
                    sys.exit(2)
                self.send(Ready(card()))
            case Submit(request=request):
                self._begin(request)
            case Cancel(job_id=job_id):
                self.send(Failed(job_id, "cancelled", "The job was cancelled."))
            case SetLoras(uses=uses) | PrepareLoras(uses=uses):
                names = ",".join(use.nickname for use in uses)
                with (self._folder / f"loras-{self._replica}").open("a") as log:
                    log.write(f"{type(message).__name__} {names}\n")
                if f"refused by {self._replica}" in names:
                    self.send(LorasRefused(message.request_id, "invalid_lora", "It does not fit.", "lora_path"))
                else:
                    self.send(LorasReady(message.request_id, LoraState()))
                    self._num_sets += isinstance(message, SetLoras)
                    self.send(Vitals(self._num_sets, DeviceMemory(1, 2, 3)))
            case Shutdown():
                sys.exit(0)

    def _begin(self, request: GenerateRequest) -> None:
        self.send(Began((request.job_id,), "transformer", None))
        self.send(Progress(request.job_id, "denoise", self._replica, request.num_inference_steps, 0.5))
        held = re.search(r"hold(?: on (\d))?", request.prompt)
        if held and held[1] in (None, str(self._replica)):
            return
        block = self._frames / f"{secrets.token_hex(16)}.frames"
        block.write_bytes(bytes([self._replica] * 3))
        self.send(Finished(request.job_id, FrameBlock(str(block), (1, 1, 1, 3)), 1, 1, 0.1))


def main(folder: str, path: str) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    replica = Replica(Path(folder), connection)
    with connection.makefile("rb") as stream:
        while header := stream.read(HEADER_BYTES):
            replica.hear(to_worker.decode(stream.read(body_length(header))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
