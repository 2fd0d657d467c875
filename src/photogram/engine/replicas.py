"""Several workers behind one queue: each loads the model on devices of its own and serves jobs of its own.

Knows which worker has which job; how one worker is driven is `worker_engine`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import EngineLost
from ..core.lora import LoraState
from ..core.messages import Failed, Finished, JobEvent
from ..core.request import GenerateRequest, LoraUse
from . import EngineState, EngineStatus, Listener
from .figures import WorkerFigures
from .worker_engine import HeldJob, WorkerEngine
from .worker_process import WORKER_COMMAND

logger = logging.getLogger(__name__)

# The first of these that a worker is in is the state of them all: what can be served is served.
_BEST_FIRST: tuple[EngineState, ...] = ("ready", "loading", "starting", "restarting", "failed", "stopped")


@dataclass(slots=True)
class _Place:
    """Who has a job."""

    engine: WorkerEngine
    cancelled: bool = False


class Replicas:
    """Implements `Engine` with `--dp-size` workers.

    A job goes to the ready worker with the least work in hand. The jobs of one that ends go to the others; while they
    serve, it is replaced.
    """

    def __init__(
        self, config: ServeConfig, frames_dir: Path, *, worker_command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        """`worker_command` starts a worker when the path of the socket is added to it."""
        self._engines = [
            WorkerEngine(
                config, frames_dir, replica=index, hand_over=partial(self._hand_over, index),
                worker_command=worker_command,
            )
            for index in range(config.dp_size)
        ]  # fmt: skip
        self._places: dict[str, _Place] = {}
        self._changing_loras = asyncio.Lock()
        self._active: tuple[tuple[LoraUse, ...], bool] = ((), True)  # the last set that all accepted

    # --- Engine

    @property
    def card(self) -> ModelCard | None:
        return next((engine.card for engine in self._engines if engine.card is not None), None)

    @property
    def status(self) -> EngineStatus:
        statuses = [engine.status for engine in self._engines]
        best = min(statuses, key=lambda status: _BEST_FIRST.index(status.state))
        num_ready = sum(status.state == "ready" for status in statuses)
        detail = best.detail
        if 0 < num_ready < len(statuses):
            others = " ".join(status.detail for status in statuses if status.state != "ready")
            detail = f"{num_ready} of {len(statuses)} workers are ready. {others}"
        return EngineStatus(
            state=best.state, detail=detail, num_restarts=sum(status.num_restarts for status in statuses)
        )

    @property
    def figures(self) -> tuple[WorkerFigures, ...]:
        return tuple(figures for engine in self._engines for figures in engine.figures)

    @property
    def worker_pids(self) -> tuple[int | None, ...]:
        """Process ids of the present workers, for operators and tests."""
        return tuple(engine.worker_pid for engine in self._engines)

    async def start(self) -> None:
        await asyncio.gather(*(engine.start() for engine in self._engines))

    async def wait_ready(self) -> ModelCard:
        pending = {asyncio.ensure_future(engine.wait_ready()) for engine in self._engines}
        refusal: BaseException | None = None
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    refusal = one.exception()
                    if refusal is None:
                        return one.result()
        finally:
            for one in pending:
                one.cancel()
        assert refusal is not None
        raise refusal

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        engine = self._least_loaded(self._usable())
        if engine is None:
            raise EngineLost(f"No worker can take the job: {self.status.detail}")
        self._places[request.job_id] = _Place(engine)
        engine.submit(request, partial(self._hear, request, listener))

    def cancel(self, job_id: str) -> None:
        place = self._places.get(job_id)
        if place is not None:
            place.cancelled = True
            place.engine.cancel(job_id)

    async def set_loras(self, uses: tuple[LoraUse, ...], *, merged: bool = True) -> LoraState:
        """As `Engine` says, on all workers or none: where one refuses, the others are given the last set again."""
        async with self._changing_loras:
            asked = self._usable()
            waiting = [engine for engine in self._engines if engine not in asked]
            answers = await asyncio.gather(
                *(engine.set_loras(uses, merged=merged) for engine in asked), return_exceptions=True
            )
            refusals = [answer for answer in answers if isinstance(answer, BaseException)]
            if refusals:
                took = (engine for engine, answer in zip(asked, answers, strict=True) if isinstance(answer, LoraState))
                await self._set_back(tuple(took))
                raise refusals[0]
            if not answers:
                raise EngineLost(f"No worker can load LoRAs: {self.status.detail}")
            for engine in waiting:
                engine.expect_loras(uses, merged=merged)
            self._active = (uses, merged)
            return _first(answers)

    async def prepare_loras(self, uses: tuple[LoraUse, ...] = (), *, pinned: bool = False) -> LoraState:
        answers = await asyncio.gather(*(engine.prepare_loras(uses, pinned=pinned) for engine in self._usable()))
        if not answers:
            raise EngineLost(f"No worker can load LoRAs: {self.status.detail}")
        return answers[0]

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*(engine.stop(grace_s) for engine in self._engines))

    # --- who serves what

    def _usable(self) -> list[WorkerEngine]:
        """The workers that are ready or, while none is, those that may become so."""
        ready = [engine for engine in self._engines if engine.status.state == "ready"]
        return ready or [engine for engine in self._engines if engine.status.state not in ("failed", "stopped")]

    def _least_loaded(self, engines: Sequence[WorkerEngine]) -> WorkerEngine | None:
        return min(engines, key=lambda engine: engine.work_in_hand, default=None)

    def _hear(self, request: GenerateRequest, listener: Listener, event: JobEvent) -> None:
        if isinstance(event, (Finished, Failed)):
            place = self._places.pop(request.job_id)
            given_up = isinstance(event, Failed) and event.code == EngineLost.code
            if given_up and place.engine.status.state == "failed" and not place.cancelled and self._usable():
                # Nothing is wrong with the job: its worker can no longer start.
                logger.warning("%s goes to another worker: %s", request.job_id, place.engine.status.detail)
                self.submit(request, listener)
                return
        listener(event)

    def _hand_over(self, index: int, job: HeldJob) -> bool:
        """Give a job of a worker that ended to another one that is ready, if there is one."""
        others = [engine for engine in self._engines if engine.status.state == "ready"]
        engine = self._least_loaded([other for other in others if other is not self._engines[index]])
        if engine is None:
            return False
        self._places[job.request.job_id].engine = engine
        engine.adopt(job)
        return True

    async def _set_back(self, engines: Sequence[WorkerEngine]) -> None:
        uses, merged = self._active
        answers = await asyncio.gather(
            *(engine.set_loras(uses, merged=merged) for engine in engines), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                # No picture is the worse for it: every job says itself which LoRAs it is made with.
                logger.error("a worker could not be given its last LoRAs again: %s", answer)


def _first(answers: Sequence[LoraState | BaseException]) -> LoraState:
    answer = answers[0]
    assert isinstance(answer, LoraState)
    return answer
