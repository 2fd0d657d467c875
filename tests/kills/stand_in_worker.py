"""A worker without torch that speaks the real wire protocol: ``python -m kills.stand_in_worker SOCKET``.

All its jobs take their steps in turn. The pixels of a job depend on its seed alone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np

from photogram.core.card import ModelCard
from photogram.core.messages import (
    Began,
    Cancel,
    Failed,
    Finished,
    FrameBlock,
    Load,
    Progress,
    Ready,
    Submit,
    ToHost,
)
from photogram.core.request import GenerateRequest
from photogram.core.wire import HEADER_BYTES, body_length, pack, to_worker
from photogram.worker.parent import end_with_parent

STEP_S = 0.004


def frames(request: GenerateRequest) -> np.ndarray:
    """The pixels of a job, (F, H, W, 3)."""
    shape = (request.num_frames or 1, request.height, request.width, 3)
    return np.random.default_rng(request.seed).integers(0, 256, shape, np.uint8)


def card() -> ModelCard:
    return ModelCard(
        name="stand-in",
        model_path="stand-in",
        pipeline_class="StandInPipeline",
        tasks=("T2I", "TI2I"),
        media="image",
        default_width=64,
        default_height=64,
        size_multiple=16,
        default_steps=4,
        max_input_images=2,
        device="cpu",
        device_name="a processor",
    )


def read_into(inbox: queue.SimpleQueue, connection: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as stream:
        while header := stream.read(HEADER_BYTES):
            inbox.put(to_worker.decode(stream.read(body_length(header))))
    os._exit(0)  # the host is gone


def main(path: str) -> None:
    end_with_parent()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read_into, args=(inbox, connection), daemon=True).start()

    def send(message: ToHost) -> None:
        connection.sendall(pack(message))

    load = inbox.get()
    assert isinstance(load, Load)
    folder = Path(load.config.frames_dir)
    send(Ready(card()))
    jobs: dict[str, tuple[GenerateRequest, int]] = {}
    while True:
        while not jobs or not inbox.empty():
            match inbox.get():
                case Submit(request=request):
                    jobs[request.job_id] = (request, 0)
                case Cancel(job_id=job_id):
                    if jobs.pop(job_id, None):
                        send(Failed(job_id, "cancelled", "The job was cancelled."))
                case other:
                    if type(other).__name__ == "Shutdown":
                        return
        send(Began(tuple(jobs), "transformer", STEP_S))
        for job_id, (request, step) in list(jobs.items()):
            time.sleep(STEP_S)
            if not all(Path(image).is_file() for image in request.images):
                del jobs[job_id]
                send(Failed(job_id, "generation_failed", "An input picture is gone."))
                continue
            total = request.num_inference_steps
            send(Progress(job_id, "denoise", step, total, step / (total + 1)))
            jobs[job_id] = (request, step + 1)
            if step == total:
                del jobs[job_id]
                pixels = frames(request)
                block = folder / f"{secrets.token_hex(16)}.frames"
                block.write_bytes(pixels.tobytes())
                send(Finished(job_id, FrameBlock(str(block), pixels.shape), 3, 16, total * STEP_S))


if __name__ == "__main__":
    main(sys.argv[1])
