"""From a resolved call to finished files: admits jobs, keeps their rows, hands them to the engine, stores the results.

Every job that was admitted ends in one final state of its row and in one outcome for its caller, whatever fails.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import (
    JOB_ERRORS,
    Busy,
    EngineLost,
    GenerationFailed,
    RequestError,
    ServiceError,
    TimedOut,
)
from ..core.messages import Failed, Finished, FrameBlock, JobEvent, Preview, Progress
from ..engine import Engine
from ..jobs.record import JobRecord, new_id
from ..jobs.store import JobStore
from ..media.image_file import FILE_TYPES
from ..media.pool import MediaPool
from ..media.provenance import describe
from ..storage import Storage, file_key
from .resolve import Drawing, ImagesCall

log = logging.getLogger(__name__)

LONGEST_RETRY_AFTER_S = 60.0
# Weight of the newest job in the running mean of how long a job takes.
_NEWEST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A picture of unfinished work; `number` counts them for one image, from 0."""

    index: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    index: int
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished picture, which is stored already. `data` is the file's bytes."""

    index: int
    image_id: str
    seed: int
    generated_size: str
    data: bytes
    prompt_tokens: int
    image_tokens: int
    warnings: tuple[str, ...]


Outcome = Partial | Stepped | Made


class _Cancelled(Exception):
    """The engine ended the job because somebody cancelled it."""


class Group:
    """The jobs of one call, for the one who waits for them."""

    def __init__(self, engine: Engine, job_ids: Sequence[str], *, wants_progress: bool) -> None:
        self._engine = engine
        self._pending = dict.fromkeys(job_ids)
        self._size = len(job_ids)
        self._outcomes: asyncio.Queue[Outcome | ServiceError] = asyncio.Queue()
        self.wants_progress = wants_progress
        self.cancelled = False
        self.when_over: Callable[[], None] = lambda: None  # called once no job of the group needs its inputs

    def cancel(self) -> None:
        """End the jobs that are not finished: nobody waits for them any more. Harmless when all are."""
        if self._pending:
            self.cancelled = True
            for job_id in self._pending:
                self._engine.cancel(job_id)

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """Yield what happens until each job has its `Made`. Raises the ServiceError of the first that fails."""
        num_made = 0
        while num_made < self._size:
            outcome = await self._outcomes.get()
            if isinstance(outcome, ServiceError):
                raise outcome
            num_made += isinstance(outcome, Made)
            yield outcome

    async def all_made(self) -> list[Made]:
        """Return the pictures in the order of their seeds. Raises the ServiceError of the first that fails."""
        made = [outcome async for outcome in self.outcomes() if isinstance(outcome, Made)]
        return sorted(made, key=lambda one: one.index)

    def post(self, outcome: Outcome | ServiceError) -> None:
        self._outcomes.put_nowait(outcome)

    def is_over(self, job_id: str) -> None:
        """Note that a job needs no cancelling any more."""
        self._pending.pop(job_id, None)
        if not self._pending:
            self.when_over()


@dataclass(slots=True, kw_only=True)
class _Job:
    """One job on its way; `ended` is false from its submission to the engine's last word on it."""

    record: JobRecord
    drawing: Drawing
    group: Group
    began: float
    events: asyncio.Queue[JobEvent] = field(default_factory=asyncio.Queue)
    is_running: bool = False
    num_previews: int = 0
    ended: bool = True

    @property
    def job_id(self) -> str:
        return self.record.job_id

    async def next_event(self) -> JobEvent:
        event = await self.events.get()
        self.ended = isinstance(event, Finished | Failed)
        return event


class Service:
    """Runs image calls. One per server; lives on the event loop."""

    def __init__(
        self, config: ServeConfig, engine: Engine, store: JobStore, storage: Storage, media: MediaPool
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._storage = storage
        self._media = media
        self._num_jobs = 0
        self._mean_run_s = 1.0
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_jobs(self) -> int:
        """Jobs admitted and not finished."""
        return self._num_jobs

    @property
    def is_draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Admit nothing any more; what was admitted goes on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Wait until every admitted job has reached its final state."""
        await self._idle.wait()

    def card(self) -> ModelCard:
        """Return the served model's card. Raises EngineLost while no job could be taken."""
        if self._draining:
            raise EngineLost("The server is shutting down.", code="shutting_down")
        return loaded_card(self._engine)

    async def begin(self, call: ImagesCall) -> Group:
        """Admit the jobs of a call, all or none, and start them. Raises Busy beyond the queue's bound."""
        card = self.card()
        num = len(call.drawings)
        limit = self._config.max_queue
        if num > limit:
            raise RequestError(f"n {num}: this server takes at most {limit} jobs at a time (--max-queue).", param="n")
        if self._num_jobs + num > limit:
            raise Busy(
                f"The queue is full: {self._num_jobs} of {limit} jobs (--max-queue). Try again later.",
                retry_after_s=min(self._mean_run_s, LONGEST_RETRY_AFTER_S),
            )
        self._count(num)
        records = _records(call, card)
        try:
            await self._store.create(records)
        except BaseException:
            self._count(-num)
            raise
        group = Group(
            self._engine, [record.job_id for record in records], wants_progress=call.stream and call.stream_progress
        )
        began = time.monotonic()
        for record, drawing in zip(records, call.drawings, strict=True):
            job = _Job(record=record, drawing=drawing, group=group, began=began)
            task = asyncio.create_task(self._attend(job, card))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return group

    def _count(self, change: int) -> None:
        self._num_jobs += change
        if self._num_jobs:
            self._idle.clear()
        else:
            self._idle.set()

    # --- one job --------------------------------------------------------------------------------------------------

    async def _attend(self, job: _Job, card: ModelCard) -> None:
        """See one job through to its final state."""
        try:
            job.group.post(await self._until_made(job, card))
        except _Cancelled:
            await self._write_end(job, None)
        except ServiceError as error:
            await self._write_end(job, error)
            job.group.post(error)
        except Exception:
            # One job's border: a fault of ours must not leave its caller waiting, nor its row unfinished.
            log.exception("job %s failed for an unforeseen reason", job.job_id)
            failure = GenerationFailed("The server failed to handle this job.", code="internal_error")
            await self._write_end(job, failure)
            job.group.post(failure)
        finally:
            await self._silence(job)
            job.group.is_over(job.job_id)
            self._count(-1)

    async def _until_made(self, job: _Job, card: ModelCard) -> Made:
        self._engine.submit(job.drawing.request, job.events.put_nowait)
        job.ended = False
        limit_s = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                finished = await self._until_finished(job)
        except TimeoutError:
            raise TimedOut(f"The job took longer than {limit_s:g} s (--request-timeout-s).") from None
        run_s = time.monotonic() - job.began
        self._mean_run_s += _NEWEST * (run_s - self._mean_run_s)
        return await self._keep(job, finished, card)

    async def _until_finished(self, job: _Job) -> Finished:
        """Follow the engine's events until the pixels are there."""
        while True:
            event = await job.next_event()
            match event:
                case Progress():
                    await self._note_running(job)
                    if job.group.wants_progress:
                        job.group.post(Stepped(index=job.record.index, progress=event))
                case Preview():
                    await self._show(job, event)
                case Finished():
                    if job.group.cancelled:
                        self._discard(event.frames)
                        raise _Cancelled
                    return event
                case Failed():
                    raise _failure(event, job.group)

    async def _note_running(self, job: _Job) -> None:
        if not job.is_running:
            job.is_running = True
            await self._store.move(job.job_id, "running")
            log.info("job %s runs", job.job_id)

    async def _show(self, job: _Job, preview: Preview) -> None:
        # A job that was begun again on another worker shows its first pictures twice.
        if job.group.cancelled or preview.index < job.num_previews:
            self._discard(preview.frames)
            return
        encoded = await self._media.encode_picture(preview.frames, job.drawing.output, None)
        job.group.post(Partial(index=job.record.index, number=job.num_previews, data=encoded.data))
        job.num_previews = preview.index + 1

    async def _keep(self, job: _Job, finished: Finished, card: ModelCard) -> Made:
        """Encode and store a picture, and complete its row."""
        request, output = job.drawing.request, job.drawing.output
        key = file_key(job.job_id, FILE_TYPES[output.format].suffix)
        try:
            await self._note_running(job)
            await self._store.move(job.job_id, "encoding", file_key=key)
        except BaseException:
            self._discard(finished.frames)
            raise
        provenance = describe(request, output, card) if self._config.metadata else None
        encoded = await self._media.encode_picture(finished.frames, output, provenance)
        await self._storage.put(key, encoded.data, encoded.content_type)
        await self._store.move(
            job.job_id,
            "completed",
            content_type=encoded.content_type,
            file_bytes=len(encoded.data),
            run_s=finished.run_s,
            prompt_tokens=finished.prompt_tokens,
            image_tokens=finished.image_tokens,
        )
        log.info("job %s completed in %.2f s", job.job_id, finished.run_s)
        return Made(
            index=job.record.index,
            image_id=job.job_id,
            seed=request.seed,
            generated_size=str(job.drawing.generated_size),
            data=encoded.data,
            prompt_tokens=finished.prompt_tokens,
            image_tokens=finished.image_tokens,
            warnings=finished.warnings,
        )

    async def _write_end(self, job: _Job, error: ServiceError | None) -> None:
        """Write how a job without a picture ended; None is cancelled."""
        try:
            if error is None:
                await self._store.move(job.job_id, "cancelled")
                log.info("job %s cancelled", job.job_id)
            else:
                await self._store.move(
                    job.job_id,
                    "failed",
                    error_code=error.code,
                    error_message=error.message,
                    error_param=error.param,
                )
                log.warning("job %s failed: %s", job.job_id, error.message)
        except ServiceError as trouble:
            # The next start finds the row unfinished and fails it.
            log.error("job %s: its end could not be written: %s", job.job_id, trouble.message)

    async def _silence(self, job: _Job) -> None:
        """Cancel a job that the engine still runs, and throw away what it sends until its last word."""
        if not job.ended:
            self._engine.cancel(job.job_id)
        while not job.ended:
            event = await job.next_event()
            if isinstance(event, Preview | Finished):
                self._discard(event.frames)

    def _discard(self, frames: FrameBlock) -> None:
        try:
            self._media.discard(frames)
        except ServiceError as error:
            log.warning("frames %s were not removed: %s", frames.path, error.message)


def loaded_card(engine: Engine) -> ModelCard:
    """Return the served model's card. Raises EngineLost before it is loaded and when no worker will ever come."""
    status, card = engine.status, engine.card
    if card is None or status.state in ("failed", "stopped"):
        raise EngineLost(f"No model can take requests now: {status.detail}", code="model_not_ready")
    return card


def _records(call: ImagesCall, card: ModelCard) -> list[JobRecord]:
    group_id, now = new_id("group"), time.time()
    return [
        JobRecord(
            job_id=drawing.request.job_id,
            group_id=group_id,
            index=index,
            kind="image",
            owner=drawing.request.owner,
            model=call.model,
            request=drawing.request,
            output=drawing.output,
            created_at=now,
        )
        for index, drawing in enumerate(call.drawings)
    ]


def _failure(event: Failed, group: Group) -> Exception:
    if event.code == "cancelled":
        return _Cancelled() if group.cancelled else EngineLost("The job was ended: the server is shutting down.")
    error = JOB_ERRORS.get(event.code, GenerationFailed)
    return error(event.message, param=event.param, code=event.code)
