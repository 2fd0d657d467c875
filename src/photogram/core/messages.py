"""What host and worker say to each other: one struct per message, grouped by who receives it.

Sent as length-prefixed msgpack over a Unix socket (`core/wire`); pixels go through shared memory and only their
place is sent. Nothing here is ever pickled.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .card import ModelCard
from .lora import LoraState
from .request import GenerateRequest, LoraUse
from .worker_config import WorkerConfig

Phase = Literal["queued", "encode", "denoise", "decode"]

GIVEN_BACK = ".free"
"""Added to the name of a frames file that its receiver has read and a sender may write anew."""
REUSED_BYTES = 1 << 20
"""A smaller file is made anew sooner than the folder is looked through."""


class FrameBlock(msgspec.Struct, frozen=True):
    """uint8 RGB (or RGBA) frames in a shared-memory file: shape (F, H, W, C), C order. The receiver unlinks it or, to
    be written anew, puts `GIVEN_BACK` on its name."""

    path: str
    shape: tuple[int, int, int, int]


class SoundBlock(msgspec.Struct, frozen=True):
    """32-bit float samples from -1 to 1 in a shared-memory file: shape (samples, channels), C order; `rate` a second.

    The receiver unlinks it.
    """

    path: str
    shape: tuple[int, int]
    rate: int


# --- received by the worker ---------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag="load"):
    config: WorkerConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    job_id: str


class SetLoras(msgspec.Struct, frozen=True, tag="set_loras"):
    """Make these the active set, in the order of merging: load them (anew where the file has changed), and merge them
    into the weights or, where not `merged`, take them out. Jobs go on under the sets they carry.

    Answered by `LorasReady`, or by `LorasRefused` with everything as it was.
    """

    request_id: str
    uses: tuple[LoraUse, ...]
    merged: bool


class PrepareLoras(msgspec.Struct, frozen=True, tag="prepare_loras"):
    """Load LoRAs without applying them, so that a job that names them can be refused or accepted. With none: only
    tell the state. Answered like `SetLoras`. `pinned` ones stay in memory whatever else is loaded."""

    request_id: str
    uses: tuple[LoraUse, ...]
    pinned: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


ToWorker = Load | Submit | Cancel | SetLoras | PrepareLoras | Shutdown


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
    """The job's pixels, and the sound of a clip that has one. `warnings` are sentences for the client (a prompt longer
    than the encoder reads)."""

    job_id: str
    frames: FrameBlock
    prompt_tokens: int
    image_tokens: int
    run_s: float
    warnings: tuple[str, ...] = ()
    sound: SoundBlock | None = None

    @property
    def blocks(self) -> tuple[FrameBlock | SoundBlock, ...]:
        """All that lies in shared memory."""
        return (self.frames,) if self.sound is None else (self.frames, self.sound)


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended without pixels; `code` is a key of `core.errors.JOB_ERRORS`, or ``cancelled``."""

    job_id: str
    code: str
    message: str
    param: str | None = None


class LorasReady(msgspec.Struct, frozen=True, tag="loras_ready"):
    request_id: str
    state: LoraState


class LorasRefused(msgspec.Struct, frozen=True, tag="loras_refused"):
    """`code` is ``lora_not_supported``, ``invalid_lora``, ``lora_not_found`` or a key of `core.errors.JOB_ERRORS`."""

    request_id: str
    code: str
    message: str
    param: str | None = None


class DeviceMemory(msgspec.Struct, frozen=True):
    """Bytes of a GPU's memory: `allocated` to tensors, `reserved` by the allocator for these and the next ones."""

    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int


class Vitals(msgspec.Struct, frozen=True, tag="vitals"):
    """How the worker is, told now and then. `num_lora_switches` counts from its start; `memory` is that of its own
    device, None on a CPU."""

    num_lora_switches: int
    memory: DeviceMemory | None


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The device is lost (a sticky error): the worker must be replaced now."""

    message: str


ToHost = (
    Loading
    | Ready
    | LoadFailed
    | Began
    | Progress
    | Preview
    | Finished
    | Failed
    | LorasReady
    | LorasRefused
    | Vitals
    | Fatal
)
JobEvent = Progress | Preview | Finished | Failed
"""What the engine tells of one job; `Finished` or `Failed` is the last."""
