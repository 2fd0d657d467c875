"""Jobs of this server: admits them, keeps them going whoever watches, and answers for each by its id.

A job is in the store before its client hears of it. From then on it is attended by the server: every admitted job
ends in one final state of its row, or is left queued for the next server. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import Busy, Conflict, EngineLost, GenerationFailed, NotFound, RequestError, ServiceError
from ..core.messages import Progress
from ..core.request import JSONValue
from ..engine import Engine
from ..jobs.inputs import InputFolders
from ..jobs.record import IllegalTransition, JobKind, JobRecord, new_id
from ..jobs.store import JobStore
from ..storage import Storage
from .attendant import Attendant, Media
from .files import stored_bytes
from .group import Group
from .live import LiveJob, Made, Moved, Outcome, Stepped, job_error, made
from .resolve import Drawing, ImagesCall
from .tallies import JobTally

LONGEST_RETRY_AFTER_S = 60.0
# Weight of the newest job in the running mean of how long a job takes.
_NEWEST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """A client's key, which makes a repeated request the same request, and the digest of what it asked for."""

    key: str
    fingerprint: str


class Service:
    """Runs jobs. One per server; lives on the event loop."""

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine,
        store: JobStore,
        storage: Storage,
        media: Media,
        inputs: InputFolders,
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._storage = storage
        self._inputs = inputs
        self.tally = JobTally()
        self._attendant = Attendant(config, engine, store, storage, media, inputs, self.tally)
        self._live: dict[str, LiveJob] = {}
        self._num_entering = 0
        self._mean_run_s = 1.0
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    # --- admitting ------------------------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        """Jobs admitted and not finished."""
        return len(self._live) + self._num_entering

    def unfinished(self) -> tuple[JobRecord, ...]:
        """Return the jobs admitted and not finished, as they are now."""
        return tuple(job.record for job in self._live.values())

    @property
    def is_draining(self) -> bool:
        return self._draining

    def card(self) -> ModelCard:
        """Return the served model's card. Raises EngineLost while no job could be taken."""
        if self._draining:
            raise EngineLost("The server is shutting down.", code="shutting_down")
        return loaded_card(self._engine)

    async def begin(
        self, call: ImagesCall, *, inputs: str | None = None, idempotency: Idempotency | None = None
    ) -> Group:
        """Admit the pictures of a call, all or none, and start them; or join those that the same request began.

        `inputs` names the folder of the pictures that they need; it is the service's to remove from here on. Raises
        Busy beyond the queue's bound, Conflict for a key that another request has used.
        """
        records = await self._enter("image", call.drawings, call.model, inputs=inputs, idempotency=idempotency)
        return await self._join(records)

    async def begin_clip(
        self,
        drawing: Drawing,
        *,
        model: str,
        inputs: str | None = None,
        idempotency: Idempotency | None = None,
        webhook_url: str | None = None,
        facts: Mapping[str, JSONValue] | None = None,
    ) -> JobRecord:
        """Admit a clip and start it, and return its record at once; or that of the same request before.

        It goes on whoever watches. `facts` is what the API's object shows beyond the request; `webhook_url` is told
        of its end, in place of `--webhook-url`. Raises as `begin`.
        """
        records = await self._enter(
            "video",
            [drawing],
            model,
            inputs=inputs,
            idempotency=idempotency,
            webhook_url=webhook_url or self._config.webhook_url,
            facts=facts,
        )
        return records[0]

    async def repeated(self, owner: str, idempotency: Idempotency | None) -> tuple[JobRecord, ...]:
        """Return the jobs that the owner's same request began before; none for a new one.

        Raises Conflict where the key belongs to another request.
        """
        if idempotency is None:
            return ()
        records = await self._store.with_idempotency_key(owner, idempotency.key)
        if any(record.fingerprint != idempotency.fingerprint for record in records):
            raise Conflict(
                "This Idempotency-Key was used with another request; send a new key with a new request.",
                param="Idempotency-Key",
                code="idempotency_conflict",
            )
        return records

    async def _enter(
        self,
        kind: JobKind,
        drawings: Sequence[Drawing],
        model: str,
        *,
        inputs: str | None,
        idempotency: Idempotency | None,
        webhook_url: str | None = None,
        facts: Mapping[str, JSONValue] | None = None,
    ) -> Sequence[JobRecord]:
        """Commit new jobs and start them; return them, or those of the same request before."""
        earlier = await self.repeated(drawings[0].request.owner, idempotency)
        if earlier:
            return self._instead(earlier, inputs)
        card = self.card()
        self._check_room(len(drawings))
        group_id, now = new_id("group"), time.time()
        records = [
            JobRecord(
                job_id=drawing.request.job_id,
                group_id=group_id,
                index=index,
                kind=kind,
                owner=drawing.request.owner,
                model=model,
                request=drawing.request,
                output=drawing.output,
                created_at=now,
                idempotency_key=idempotency.key if idempotency else None,
                fingerprint=idempotency.fingerprint if idempotency else None,
                served_model=card.name,
                inputs=inputs,
                webhook_url=webhook_url,
                facts=dict(facts or {}),
            )
            for index, drawing in enumerate(drawings)
        ]
        # A caller that goes away in the middle must not leave a row that nobody attends to.
        return await asyncio.shield(asyncio.create_task(self._commit(records, inputs, idempotency)))

    def _check_room(self, num: int) -> None:
        limit = self._config.max_queue
        if num > limit:
            raise RequestError(f"n {num}: this server takes at most {limit} jobs at a time (--max-queue).", param="n")
        if self.num_jobs + num > limit:
            raise Busy(
                f"The queue is full: {self.num_jobs} of {limit} jobs (--max-queue). Try again later.",
                retry_after_s=min(self._mean_run_s, LONGEST_RETRY_AFTER_S),
            )

    async def _commit(
        self, records: Sequence[JobRecord], inputs: str | None, idempotency: Idempotency | None
    ) -> Sequence[JobRecord]:
        """Write the rows and start their jobs. Of two requests with one key that come at once, one gets here first."""
        self._enter_or_leave(len(records))
        try:
            await self._store.create(records)
            for record in records:
                self._start(record)
            return records
        except Conflict:
            earlier = await self.repeated(records[0].owner, idempotency)
            if not earlier:
                raise
            return self._instead(earlier, inputs)
        finally:
            self._enter_or_leave(-len(records))

    def _instead(self, earlier: Sequence[JobRecord], inputs: str | None) -> Sequence[JobRecord]:
        if inputs is not None:
            self._inputs.remove(inputs)
        return earlier

    async def _join(self, records: Sequence[JobRecord]) -> Group:
        """Return a group of jobs, some of which may be over. Raises the error of one that failed."""
        live = [self._live[record.job_id] for record in records if record.job_id in self._live]
        done: list[Made] = []
        for record in records:
            if record.job_id in self._live:
                continue
            if not record.is_finished:
                record = await self._store.get(record.job_id)
            if record.state == "completed":
                done.append(made(record, await stored_bytes(record, self._storage)))
            else:
                raise _no_picture(record)
        return Group(live, self._give_up, done=done)

    # --- running --------------------------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Take up the jobs that an earlier server left queued, oldest first, however many they are."""
        for record in await self._store.unfinished():
            self._start(record)

    def _start(self, record: JobRecord) -> None:
        job = LiveJob(record, time.monotonic())
        self._live[record.job_id] = job
        self.tally.accepted(job)
        self._idle.clear()
        task = asyncio.create_task(self._attend(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, job: LiveJob) -> None:
        try:
            await self._attendant.attend(job)
        finally:
            del self._live[job.job_id]
            self.tally.ended(job, time.monotonic())
            self._enter_or_leave(0)
        if job.record.state == "completed":
            self._mean_run_s += _NEWEST * (time.monotonic() - job.began - self._mean_run_s)

    def _enter_or_leave(self, change: int) -> None:
        self._num_entering += change
        if self.num_jobs:
            self._idle.clear()
        else:
            self._idle.set()

    def _give_up(self, job: LiveJob) -> None:
        """End a job that nobody wants any more; its attendant writes the row."""
        if job.job_id in self._live and not job.record.is_finished:
            self._halt(job, is_unwanted=True)

    def _halt(self, job: LiveJob, *, is_unwanted: bool, is_deleted: bool = False) -> None:
        job.halt(is_unwanted=is_unwanted, is_deleted=is_deleted)
        self._engine.cancel(job.job_id)

    # --- one job by its id ----------------------------------------------------------------------------------------

    def progress(self, job_id: str) -> Progress | None:
        """Return how far an unfinished job is; None where nothing is known yet, or any more."""
        job = self._live.get(job_id)
        return None if job is None else job.progress

    async def watch(self, job_id: str) -> AsyncGenerator[Outcome, None]:
        """Yield where a job is, then what happens to it: `Moved` for each state, `Stepped`, `Partial`.

        The last is a `Moved` to a final state. Any number may watch. Raises NotFound, also when the job is deleted
        meanwhile, and EngineLost when this server stops before the job is done.
        """
        job = self._live.get(job_id)
        if job is None or job.record.is_finished:
            yield Moved(record=await self._store.get(job_id))
            return
        with job.followed() as outcomes:
            yield Moved(record=job.record)
            if job.progress is not None:
                yield Stepped(index=job.record.index, progress=job.progress)
            async for outcome in outcomes:
                yield outcome

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job and return its record; one that is finished stays as it is. Raises NotFound."""
        try:
            record = await self._store.move(job_id, "cancelled")
        except IllegalTransition:
            return await self._store.get(job_id)
        job = self._live.get(job_id)
        if job is not None:
            job.move(record)
            self._halt(job, is_unwanted=True)
        elif record.inputs:
            await asyncio.to_thread(self._inputs.remove, record.inputs)
        return record

    async def delete(self, job_id: str) -> None:
        """Forget a job with its file; an unfinished one is stopped first. Raises NotFound, StorageFailed.

        The file goes before the row, so that no file is ever without its row.
        """
        job = self._live.get(job_id)
        if job is not None:
            self._halt(job, is_unwanted=True, is_deleted=True)
            await job.wait_over()
        record = await self._store.get(job_id)
        if record.file_key is not None:
            with suppress(NotFound):
                await self._storage.delete(record.file_key)
        await self._store.delete(job_id)
        if record.inputs:
            await asyncio.to_thread(self._inputs.remove, record.inputs)

    # --- ending ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Admit nothing any more. What runs goes on, and so does what a client waits for; the rest stays queued."""
        self._draining = True
        for job in self._live.values():
            if job.record.outlives_client and job.record.state == "queued":
                self._halt(job, is_unwanted=False)

    async def wait_idle(self) -> None:
        """Wait until every admitted job is over here."""
        await self._idle.wait()

    async def end(self) -> None:
        """Wait for the ends of the jobs, once the engine has stopped."""
        self._attendant.hurry()
        await self._idle.wait()


def loaded_card(engine: Engine) -> ModelCard:
    """Return the served model's card. Raises EngineLost before it is loaded and when no worker will ever come."""
    status, card = engine.status, engine.card
    if card is None or status.state in ("failed", "stopped"):
        raise EngineLost(f"No model can take requests now: {status.detail}", code="model_not_ready")
    return card


def _no_picture(record: JobRecord) -> ServiceError:
    """Return why a picture that was asked for before is not there."""
    if record.state == "failed":
        return job_error(record.error_code or "generation_failed", record.error_message or "", record.error_param)
    if record.state == "cancelled":
        return GenerationFailed(f"Image '{record.job_id}' was cancelled.", code="cancelled")
    return EngineLost(f"Image '{record.job_id}' is {record.state}; it waits for a server of its model.")
