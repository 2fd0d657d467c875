"""What host and worker say to each other: one struct per message, grouped by who receives it.

Sent as length-prefixed msgpack over a Unix socket (`core/wire`); pixels go through shared memory and only their
place is sent. Nothing here is ever pickled.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .card import ModelCard
from .config import WorkerConfig
from .request import GenerateRequest

Phase = Literal["queued", "encode", "denoise", "decode"]


class FrameBlock(msgspec.Struct, frozen=True):
    """uint8 RGB (or RGBA) frames in a shared-memory file: shape (F, H, W, C), C order. The receiver unlinks it."""

    path: str
    shape: tuple[int, int, int, int]


# --- received by the worker ---------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag="load"):
    config: WorkerConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    job_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


ToWorker = Load | Submit | Cancel | Shutdown


# --- received by the host -----------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """What the worker is busy with before it is ready, for the log and `/ready`."""

    stage: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    card: ModelCard


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The model can never be served as configured; one line for the operator."""

    message: str


class Began(msgspec.Struct, frozen=True, tag="began"):
    """A plan is about to run. The host replaces a worker that stays silent far beyond `expected_s` seconds."""

    job_ids: tuple[str, ...]
    module: str
    expected_s: float | None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """`fraction` is 0..1 over all phases and never falls; `eta_s` is None while nothing is known."""

    job_id: str
    phase: Phase
    step: int
    num_steps: int
    fraction: float
    eta_s: float | None = None


class Preview(msgspec.Struct, frozen=True, tag="preview"):
    """Picture of the solver's current estimate; `index` counts from 0."""

    job_id: str
    index: int
    frames: FrameBlock


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The job's pixels. `warnings` are sentences for the client (a prompt longer than the encoder reads)."""

    job_id: str
    frames: FrameBlock
    prompt_tokens: int
    image_tokens: int
    run_s: float
    warnings: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended without pixels; `code` is a key of `core.errors.JOB_ERRORS`, or ``cancelled``."""

    job_id: str
    code: str
    message: str
    param: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The device is lost (a sticky error): the worker must be replaced now."""

    message: str


ToHost = Loading | Ready | LoadFailed | Began | Progress | Preview | Finished | Failed | Fatal
JobEvent = Progress | Preview | Finished | Failed
"""What the engine tells of one job; `Finished` or `Failed` is the last."""
