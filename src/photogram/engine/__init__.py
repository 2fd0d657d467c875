"""The host's side of the workers: start, feed, watch and replace them.

Knows processes, sockets and deadlines; knows nothing of HTTP, of the job store or of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..core.card import ModelCard
from ..core.lora import LoraState
from ..core.messages import JobEvent
from ..core.request import GenerateRequest, LoraUse
from .figures import WorkerFigures

EngineState = Literal["starting", "loading", "ready", "restarting", "failed", "stopped"]

Listener = Callable[[JobEvent], None]
"""Called on the event loop for each event of one job; `Finished` or `Failed` is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """`detail` is a sentence for people; `num_restarts` counts replaced workers since the start."""

    state: EngineState
    detail: str
    num_restarts: int = 0


class Engine(Protocol):
    """Runs jobs. `WorkerEngine` (engine/worker_engine.py) is the real one; tests of the HTTP side use a fake."""

    @property
    def card(self) -> ModelCard | None:
        """The served model, known once it was loaded; stays known while a worker is replaced."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def figures(self) -> Sequence[WorkerFigures]:
        """What the workers have done since the start, one entry for each that runs beside the others."""

    async def start(self) -> None:
        """Start the worker and return at once; `status` tells when it is ready."""

    async def wait_ready(self) -> ModelCard:
        """Wait for the first readiness. Raises ConfigError when the model can never be served."""

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Hand over a job. Its last event always comes, whatever dies. A job given while a worker is being
        replaced waits for the new one. Raises EngineLost when no worker will ever come."""

    def cancel(self, job_id: str) -> None:
        """End a job at its next call; its listener hears `Failed` with code ``cancelled``. Unknown ids are ignored."""

    async def set_loras(self, uses: tuple[LoraUse, ...], *, merged: bool = True) -> LoraState:
        """Make `uses` the active set, merged into the weights or (`merged` False) loaded only; a worker that takes
        this one's place gets it again. Which jobs use it is told by each job's own `loras`.

        Raises RequestError (codes ``lora_not_supported``, ``invalid_lora``, ``lora_not_found``), OutOfMemory or
        EngineLost, all with everything as it was.
        """

    async def prepare_loras(self, uses: tuple[LoraUse, ...] = (), *, pinned: bool = False) -> LoraState:
        """Load LoRAs without applying them and tell the state; with none, only tell it. Raises as `set_loras`."""

    async def stop(self, grace_s: float) -> None:
        """Let running jobs finish for `grace_s` seconds, then end the worker; other jobs hear `Failed`."""
