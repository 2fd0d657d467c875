"""The real engine: one worker process, replaced when it dies, hangs or loses its device.

The host keeps every job it has handed over until the last event: when a worker ends, the jobs go to its successor.
A job whose own call was running at that moment is tried once more; one that was merely waiting is not to blame.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import JOB_ERRORS, ConfigError, EngineLost, RequestError, ServiceError
from ..core.lora import LoraState
from ..core.messages import (
    Began,
    Cancel,
    Failed,
    Fatal,
    Finished,
    Load,
    LoadFailed,
    Loading,
    LorasReady,
    LorasRefused,
    PrepareLoras,
    Preview,
    Progress,
    Ready,
    SetLoras,
    Shutdown,
    Submit,
    ToHost,
    Vitals,
)
from ..core.request import GenerateRequest, LoraUse
from . import EngineStatus, Listener
from .figures import WorkerFigures
from .worker_process import WORKER_COMMAND, WorkerProcess

logger = logging.getLogger(__name__)

MAX_TRIES = 2  # of a job whose own call was running when its worker ended
MAX_INTERRUPTIONS = 5  # of a job that was waiting then
MAX_FAILED_STARTS = 3  # in a row, before the model counts as unservable
RESTART_PAUSE_S = 1.0
SHORTEST_PATIENCE_S = 60.0
PATIENCE_FACTOR = 30.0  # silence, in units of what a pass was expected to take


@dataclass(slots=True)
class HeldJob:
    """A job in hand, and what it has been through."""

    request: GenerateRequest
    listener: Listener
    tries: int = 0
    interruptions: int = 0
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _LoraRequest:
    message: SetLoras | PrepareLoras
    answer: asyncio.Future[LoraState]
    sent: bool = False


@dataclass(slots=True)
class _Silence:
    """How long the worker may say nothing."""

    since: float = field(default_factory=time.monotonic)
    patience_s: float = 0.0


class WorkerEngine:
    """Implements `Engine` with a worker process."""

    def __init__(
        self, config: ServeConfig, frames_dir: Path, *, replica: int = 0,
        hand_over: Callable[[HeldJob], bool] = lambda job: False, worker_command: Sequence[str] = WORKER_COMMAND,
    ) -> None:  # fmt: skip
        """`worker_command` starts a worker when the path of the socket is added to it.

        Of `--dp-size` workers this is the `replica`-th, from 0; `hand_over` is offered each job that would wait for
        the next worker, and says whether another one has taken it.
        """
        self._config = config
        self._replica = replica
        self._hand_over = hand_over
        self._frames_dir = frames_dir
        self._command = worker_command
        self._card: ModelCard | None = None
        self._figures = WorkerFigures()
        self._status = EngineStatus(state="starting", detail="The worker is starting.")
        self._jobs: dict[str, HeldJob] = {}
        self._running: frozenset[str] = frozenset()  # jobs of the pass in progress
        self._lora_requests: dict[str, _LoraRequest] = {}
        self._active_loras: SetLoras | None = None  # the last set that a worker accepted
        self._silence = _Silence(patience_s=config.hang_timeout_s)
        self._worker: WorkerProcess | None = None
        self._ready = asyncio.Event()
        self._first_ready: asyncio.Future[ModelCard] | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._num_restarts = 0
        self._reason = ""  # why the present worker was or is to be ended by us

    # --- Engine

    @property
    def card(self) -> ModelCard | None:
        return self._card

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def figures(self) -> tuple[WorkerFigures]:
        return (self._figures,)

    @property
    def worker_pid(self) -> int | None:
        """Process id of the present worker, for operators and tests."""
        return None if self._worker is None else self._worker.pid

    async def start(self) -> None:
        self._first_ready = asyncio.get_running_loop().create_future()
        # A failure nobody waits for is in the log and in `status` all the same.
        self._first_ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._supervision = asyncio.create_task(self._supervise(), name="engine")

    async def wait_ready(self) -> ModelCard:
        assert self._first_ready is not None, "start() comes first"
        return await asyncio.shield(self._first_ready)

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        if self._stopping or self._status.state in ("failed", "stopped"):
            raise EngineLost(f"No worker can take the job: {self._status.detail}")
        self.adopt(HeldJob(request, listener))

    @property
    def work_in_hand(self) -> int:
        """What there is still to do or being done, in steps times pixels."""
        return sum(_work(job.request) for job in self._jobs.values())

    def adopt(self, job: HeldJob) -> None:
        """Take a job over from another engine, whose worker ended."""
        self._jobs[job.request.job_id] = job
        self._idle.clear()
        if self._worker is not None and self._ready.is_set():
            self._worker.send(Submit(job.request))

    def cancel(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        job.cancelled = True
        if self._worker is not None and self._ready.is_set():
            self._worker.send(Cancel(job_id))
        else:
            self._conclude(Failed(job_id, "cancelled", "The job was cancelled."))

    async def set_loras(self, uses: tuple[LoraUse, ...], *, merged: bool = True) -> LoraState:
        message = SetLoras(secrets.token_hex(8), uses, merged)
        state = await self._ask_for_loras(message)
        self._active_loras = message
        return state

    def expect_loras(self, uses: tuple[LoraUse, ...], *, merged: bool) -> None:
        """Make `uses` the active set of a worker that was not ready when others were asked, without an answer."""
        self._active_loras = SetLoras(secrets.token_hex(8), uses, merged)
        if self._worker is not None and self._ready.is_set():
            self._worker.send(self._active_loras)

    async def prepare_loras(self, uses: tuple[LoraUse, ...] = (), *, pinned: bool = False) -> LoraState:
        return await self._ask_for_loras(PrepareLoras(secrets.token_hex(8), uses, pinned))

    async def stop(self, grace_s: float) -> None:
        self._stopping = True
        if not self._idle.is_set():
            try:
                await asyncio.wait_for(self._idle.wait(), grace_s)
            except TimeoutError:
                logger.warning("%d jobs did not finish within %.0f s", len(self._jobs), grace_s)
        if self._worker is not None:
            self._worker.send(Shutdown())
            await self._worker.wait(timeout_s=5.0)
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        self._set_status("stopped", "The server is stopping.")
        self._drop_lora_requests("the server is stopping", all_of_them=True)
        for job_id in list(self._jobs):
            self._conclude(Failed(job_id, EngineLost.code, "The server stopped before the job was done."))

    # --- LoRAs

    async def _ask_for_loras(self, message: SetLoras | PrepareLoras) -> LoraState:
        """Send a question about LoRAs to this worker or, while there is none, to the next one; return its answer."""
        if self._stopping or self._status.state in ("failed", "stopped"):
            raise EngineLost(f"No worker can load LoRAs: {self._status.detail}")
        request = _LoraRequest(message, asyncio.get_running_loop().create_future())
        self._lora_requests[message.request_id] = request
        if self._ready.is_set():
            self._send_lora_request(request)
        try:
            return await request.answer
        finally:
            self._lora_requests.pop(message.request_id, None)

    def _send_lora_request(self, request: _LoraRequest) -> None:
        assert self._worker is not None
        request.sent = True
        self._worker.send(request.message)

    def _hear_of_loras(self, message: LorasReady | LorasRefused) -> None:
        request = self._lora_requests.get(message.request_id)
        if isinstance(message, LorasRefused):
            if request is None:  # the active set, given again to a new worker: jobs that use it will say so too
                logger.error("the LoRAs that were set are no longer to be had: %s", message.message)
            elif not request.answer.done():
                request.answer.set_exception(_lora_error(message))
        elif request is not None and not request.answer.done():
            request.answer.set_result(message.state)

    def _drop_lora_requests(self, reason: str, *, all_of_them: bool = False) -> None:
        """Answer what can no longer be answered: a question that a worker died over is not put to the next one."""
        for request in self._lora_requests.values():
            if (request.sent or all_of_them) and not request.answer.done():
                request.answer.set_exception(EngineLost(f"The worker ended before the LoRAs were loaded ({reason})."))

    # --- the worker's life

    async def _supervise(self) -> None:
        """Keep one worker running until told to stop or until it cannot start."""
        failed_starts = 0
        while not self._stopping:
            code, was_ready, reason = await self._live_once()
            if self._stopping:
                self._set_status("stopped", f"The server is stopping, and its worker ended ({_describe(code)}).")
                break
            if self._status.state == "failed":
                break
            failed_starts = 0 if was_ready else failed_starts + 1
            logger.error("the worker ended (%s); jobs in hand: %d", reason or _describe(code), len(self._jobs))
            if failed_starts >= MAX_FAILED_STARTS:
                self._give_up(f"The worker ended {failed_starts} times while loading ({reason or _describe(code)}).")
                break
            self._num_restarts += 1
            self._set_status("restarting", f"The worker ended ({reason or _describe(code)}) and is being replaced.")
            self._drop_lora_requests(reason or _describe(code))
            self._interrupt_jobs(reason or _describe(code))
            await asyncio.sleep(RESTART_PAUSE_S * failed_starts)
        self._drop_lora_requests(self._status.detail, all_of_them=True)
        for job_id in list(self._jobs):
            self._conclude(Failed(job_id, EngineLost.code, self._status.detail))

    async def _live_once(self) -> tuple[int, bool, str]:
        """Run one worker from start to end: its exit code, whether it was ready, and why it was ended by us."""
        self._ready.clear()
        self._reason = ""
        try:
            self._worker = await WorkerProcess.start(self._config.kernels_path, self._command)
        except OSError as error:
            return 1, False, str(error)
        logger.info("worker %d started", self._worker.pid)
        self._worker.send(Load(self._config.worker(self._frames_dir, self._replica)))
        watch = asyncio.create_task(self._watch(self._worker), name="engine-watch")
        try:
            code = await self._worker.run(self._hear)
        finally:
            watch.cancel()
            if self._worker is not None:
                self._worker.kill()
            self._worker = None
            self._figures.ended()
        was_ready = self._ready.is_set()
        self._ready.clear()
        return code, was_ready, self._reason

    async def _watch(self, worker: WorkerProcess) -> None:
        """End a worker that says nothing for longer than its pass can explain."""
        while True:
            await asyncio.sleep(min(1.0, self._config.hang_timeout_s / 4))
            silent_s = time.monotonic() - self._silence.since
            has_work = self._jobs or self._lora_requests
            if self._ready.is_set() and has_work and silent_s > self._silence.patience_s:
                self._reason = f"it did not answer for {silent_s:.0f} s"
                logger.error("worker %d %s; ending it", worker.pid, self._reason)
                worker.kill()
                return

    def _hear(self, message: ToHost) -> None:
        self._silence = _Silence(patience_s=self._config.hang_timeout_s)
        match message:
            case Loading(stage=stage):
                logger.info("worker: %s", stage)
                if self._status.state != "restarting":
                    self._set_status("loading", f"The worker is {stage}.")
            case Ready(card=card):
                self._on_ready(card)
            case LoadFailed(message=text):
                self._give_up(text)
            case Fatal(message=text):
                self._reason = f"the device is lost: {text}"
            case Vitals():
                self._figures.told(message)
            case Began(job_ids=job_ids, expected_s=expected_s):
                self._figures.began(message)
                self._running = frozenset(job_ids)
                if expected_s is not None:
                    explained_s = max(SHORTEST_PATIENCE_S, PATIENCE_FACTOR * expected_s)
                    self._silence.patience_s = min(self._config.hang_timeout_s, explained_s)
            case LorasReady() | LorasRefused():
                self._hear_of_loras(message)
            case Finished() | Failed():
                self._conclude(message)
            case Progress() | Preview():
                job = self._jobs.get(message.job_id)
                if job is not None:
                    job.listener(message)
                elif isinstance(message, Preview):
                    Path(message.frames.path).unlink(missing_ok=True)

    def _on_ready(self, card: ModelCard) -> None:
        self._card = card
        self._ready.set()
        self._set_status("ready", "The model is loaded and warm.")
        assert self._first_ready is not None
        if not self._first_ready.done():
            self._first_ready.set_result(card)
        assert self._worker is not None
        # Before the jobs, which are to find the LoRAs loaded.
        if self._active_loras is not None:
            self._worker.send(self._active_loras)
        for request in self._lora_requests.values():
            self._send_lora_request(request)
        for job in self._jobs.values():
            self._worker.send(Submit(job.request))

    def _give_up(self, text: str) -> None:
        self._set_status("failed", text)
        assert self._first_ready is not None
        if not self._first_ready.done():
            self._first_ready.set_exception(ConfigError(text))

    def _interrupt_jobs(self, reason: str) -> None:
        """Decide for each job in hand whether the next worker gets it."""
        running, self._running = self._running, frozenset()
        for job_id, job in list(self._jobs.items()):
            if job.cancelled:
                self._conclude(Failed(job_id, "cancelled", "The job was cancelled."))
                continue
            if job_id in running:
                job.tries += 1
            else:
                job.interruptions += 1
            if job.tries >= MAX_TRIES or job.interruptions > MAX_INTERRUPTIONS:
                text = f"The worker ended while it ran this job ({reason}), {job.tries + job.interruptions} times."
                self._conclude(Failed(job_id, EngineLost.code, text))
            elif self._hand_over(job):
                del self._jobs[job_id]
                if not self._jobs:
                    self._idle.set()
                logger.warning("%s goes to another worker: %s", job_id, reason)
            else:
                logger.warning("%s is tried again: %s", job_id, reason)

    def _conclude(self, event: Finished | Failed) -> None:
        job = self._jobs.pop(event.job_id, None)
        if not self._jobs:
            self._idle.set()
        if job is not None:
            job.listener(event)
        elif isinstance(event, Finished):
            for block in event.blocks:
                Path(block.path).unlink(missing_ok=True)

    def _set_status(self, state: str, detail: str) -> None:
        self._status = EngineStatus(state=state, detail=detail, num_restarts=self._num_restarts)  # type: ignore[arg-type]


def _work(request: GenerateRequest) -> int:
    return request.num_inference_steps * request.width * request.height * (request.num_frames or 1)


def _lora_error(refusal: LorasRefused) -> ServiceError:
    error = JOB_ERRORS.get(refusal.code)
    if error is not None:
        return error(refusal.message, param=refusal.param)
    return RequestError(refusal.message, param=refusal.param, code=refusal.code)


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
