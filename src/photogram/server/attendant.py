"""Sees one job from the engine to its file and its final row, whatever fails on the way.

The row is the judge: an end is real once it is written, and of two ends (a result and a cancel, say) the one that was
written first stands. The order of a result is: frames, file lasting in storage under the key that the row names, row
`completed`. Knows nothing of HTTP, nor of who is waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

import msgspec

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import ConfigError, EngineLost, GenerationFailed, NotFound, ServiceError, StorageFailed, TimedOut
from ..core.messages import Failed, Finished, FrameBlock, Preview, Progress, SoundBlock
from ..core.request import OutputSpec
from ..engine import Engine
from ..jobs.inputs import InputFolders
from ..jobs.record import FINISHED, IllegalTransition, JobState
from ..jobs.recovery import result_key
from ..jobs.store import JobStore
from ..media.image_file import FILE_TYPES
from ..media.provenance import Provenance, describe
from ..storage import Storage
from .live import LiveJob, Partial, job_error, made
from .tallies import JobTally

log = logging.getLogger(__name__)

_PREVIEW_COMPRESSION = 50
# Pauses before a row that could not be written is tried again.
_WRITE_AGAIN_S = (0.2, 1.0, 5.0, 20.0)


class EncodedFile(Protocol):
    @property
    def data(self) -> bytes: ...


class Media(Protocol):
    """Frames to files: `MediaPool` (media/pool.py). The frames are gone afterwards, whatever happens."""

    async def encode_picture(
        self, block: FrameBlock, output: OutputSpec, provenance: Provenance | None
    ) -> EncodedFile: ...

    async def encode_clip(
        self, block: FrameBlock, output: OutputSpec, provenance: Provenance | None, sound: SoundBlock | None
    ) -> EncodedFile: ...

    def discard(self, block: FrameBlock | SoundBlock) -> None: ...


class _Postponed(Exception):
    """This server cannot finish the job, and the next one shall."""


class _Unwanted(Exception):
    """The job was cancelled or deleted."""


class Attendant:
    """Attends to jobs; one `attend` for each."""

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine,
        store: JobStore,
        storage: Storage,
        media: Media,
        inputs: InputFolders,
        tally: JobTally,
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._storage = storage
        self._media = media
        self._inputs = inputs
        self._tally = tally
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        """Wait no more for a store that fails: the server ends, and the next one will settle what is left."""
        self._hurried.set()

    async def attend(self, job: LiveJob) -> None:
        """See one job through to its final state, or leave it queued for the next server."""
        try:
            card = await self._card_for(job)
            await self._keep(job, await self._until_finished(job), card)
        except _Unwanted:
            await self._put_away(job)
        except _Postponed:
            await self._postpone(job)
        except ServiceError as error:
            await self._fail(job, error)
        except Exception:
            # One job's border: a fault of ours must not leave its caller waiting, nor its row unfinished.
            log.exception("job %s failed for an unforeseen reason", job.job_id)
            await self._fail(job, GenerationFailed("The server failed to handle this job.", code="internal_error"))
        finally:
            await self._silence(job)
            await self._remove_inputs(job)
            job.end()

    # --- the way to a result --------------------------------------------------------------------------------------

    async def _card_for(self, job: LiveJob) -> ModelCard:
        """Return the served model's card, once it is loaded, when it is the one that the job was accepted for."""
        card = self._engine.card
        if card is None:
            card = await self._loaded_card(job)
        else:
            self._go_on(job)
        if job.record.served_model not in (None, card.name):
            wanted = job.record.served_model
            log.warning("job %s waits for a server of '%s'; this one serves '%s'", job.job_id, wanted, card.name)
            raise _Postponed
        return card

    async def _loaded_card(self, job: LiveJob) -> ModelCard:
        """Wait for the model, unless the job is halted before."""
        ready = asyncio.ensure_future(self._engine.wait_ready())
        halted = asyncio.ensure_future(job.halted.wait())
        try:
            await asyncio.wait({ready, halted}, return_when=asyncio.FIRST_COMPLETED)
            self._go_on(job)
            return ready.result()
        except ConfigError as error:
            raise _Postponed from error
        finally:
            ready.cancel()
            halted.cancel()

    def _go_on(self, job: LiveJob) -> None:
        if job.is_unwanted:
            raise _Unwanted
        if job.halted.is_set():
            raise _Postponed

    async def _until_finished(self, job: LiveJob) -> Finished:
        """Hand the job to the engine and follow its events until the pixels are there."""
        self._submit(job)
        limit_s = self._config.request_timeout_s
        # A client waits for a picture, so its time in the queue counts; a clip's clock starts with its work.
        left_s = None if job.record.outlives_client else job.began + limit_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s) as timer:
                while True:
                    match await job.next_event():
                        case Progress() as progress:
                            job.stages.enter(progress.phase, time.monotonic())
                            self._tally.progressed(job, progress)
                            if job.record.state == "queued":
                                await self._begin(job)
                                if left_s is None:
                                    timer.reschedule(asyncio.get_running_loop().time() + limit_s)
                            job.step(progress)
                        case Preview() as preview:
                            await self._show(job, preview)
                        case Finished() as finished:
                            return finished
                        case Failed() as failed:
                            raise self._reason(job, failed)
        except TimeoutError:
            raise TimedOut(f"The job took longer than {limit_s:g} s (--request-timeout-s).") from None

    def _submit(self, job: LiveJob) -> None:
        try:
            self._engine.submit(job.record.request, job.listen)
        except EngineLost:
            if job.record.outlives_client:
                raise _Postponed from None
            raise
        job.in_engine = True

    async def _begin(self, job: LiveJob) -> None:
        await self._move(job, "running")
        log.info("job %s runs", job.job_id)

    async def _show(self, job: LiveJob, preview: Preview) -> None:
        # A job that was begun again on another worker shows its first pictures twice.
        if job.is_unwanted or not job.is_followed or preview.index < job.num_previews:
            self._discard(preview.frames)
            return
        encoded = await self._media.encode_picture(preview.frames, _preview_output(job.record.output), None)
        job.tell(Partial(index=job.record.index, number=job.num_previews, data=encoded.data))
        job.num_previews = preview.index + 1

    async def _keep(self, job: LiveJob, finished: Finished, card: ModelCard) -> None:
        """Encode and store the result, and complete the row."""
        request, output = job.record.request, job.record.output
        job.stages.enter("file", time.monotonic())
        key, content_type = result_key(job.record), FILE_TYPES[output.format].content_type
        try:
            if job.is_unwanted:
                raise _Unwanted
            if job.record.state == "queued":
                await self._begin(job)
            await self._move(
                job,
                "encoding",
                file_key=key,
                content_type=content_type,
                run_s=finished.run_s,
                prompt_tokens=finished.prompt_tokens,
                image_tokens=finished.image_tokens,
                warnings=finished.warnings,
            )
        except BaseException:
            self._discard(*finished.blocks)
            raise
        provenance = describe(request, output, card) if self._config.metadata else None
        encoded: EncodedFile
        if output.format == "mp4":
            encoded = await self._media.encode_clip(finished.frames, output, provenance, finished.sound)
        else:
            if finished.sound is not None:  # of a model of clips that draws one frame
                self._discard(finished.sound)
            encoded = await self._media.encode_picture(finished.frames, output, provenance)
        if job.is_unwanted:
            raise _Unwanted
        await self._storage.put(key, encoded.data, content_type)
        await self._move(job, "completed", file_bytes=len(encoded.data))
        log.info("job %s completed in %.2f s", job.job_id, finished.run_s)
        if job.record.kind == "image":
            job.tell(made(job.record, encoded.data))

    def _reason(self, job: LiveJob, failed: Failed) -> Exception:
        """Return what the engine's refusal means: an end of the job, or of this server's part in it."""
        if job.is_unwanted:
            return _Unwanted()
        has_ended = failed.code == EngineLost.code and self._engine.status.state in ("failed", "stopped")
        if (has_ended or failed.code == "cancelled") and job.record.outlives_client:
            return _Postponed()
        if failed.code == "cancelled":
            return EngineLost("The job was ended: the server is shutting down.")
        return job_error(failed.code, failed.message, failed.param)

    # --- other ends -----------------------------------------------------------------------------------------------

    async def _fail(self, job: LiveJob, error: ServiceError) -> None:
        log.warning("job %s failed: %s", job.job_id, error.message)
        try:
            await self._move(
                job,
                "failed",
                is_end=True,
                trouble=error,
                error_code=error.code,
                error_message=error.message,
                error_param=error.param,
            )
        except _Unwanted:
            await self._put_away(job)
            return
        except StorageFailed as failure:
            log.error("job %s: its end could not be written: %s", job.job_id, failure.message)
        job.tell(error)
        await self._remove_file(job)

    async def _put_away(self, job: LiveJob) -> None:
        """Remove what a job without a result leaves, once its row is `cancelled` or deleted."""
        try:
            record = await self._store.get(job.job_id)
            if job.is_deleted:
                job.tell(_deleted(job))
            elif not record.is_finished:
                await self._move(job, "cancelled", is_end=True)
            job.record = record if record.is_finished else job.record
            log.info("job %s cancelled", job.job_id)
        except (NotFound, _Unwanted):
            job.tell(_deleted(job))
        except StorageFailed as failure:
            log.error("job %s: its end could not be written: %s", job.job_id, failure.message)
            return
        await self._remove_file(job)

    async def _postpone(self, job: LiveJob) -> None:
        """Leave the job to the next server, as if it had not begun."""
        log.info("job %s stays queued for the next start", job.job_id)
        try:
            if job.record.state != "queued":
                await self._move(job, "queued")
        except _Unwanted:
            await self._put_away(job)
            return
        except StorageFailed as failure:
            log.error("job %s: could not be queued again: %s", job.job_id, failure.message)
        job.tell(EngineLost(f"'{job.job_id}' stays queued: this server stops before it is done."))

    async def _move(
        self, job: LiveJob, to: JobState, *, is_end: bool = False, trouble: ServiceError | None = None, **known: Any
    ) -> None:
        """Write and tell a job's new state.

        Of a job that does not outlive its client only the end is written: wherever it stands, the next server would
        fail it. One that outlives its client does not fail because the store does for some seconds, and an end is
        tried until the server itself ends; `trouble` is told meanwhile. Raises _Unwanted when somebody else has ended
        the job, StorageFailed.
        """
        skipping = not job.record.outlives_client
        if skipping and to not in FINISHED:
            job.pass_through(to, known)
            return
        known = job.unwritten | known
        pauses = iter(_WRITE_AGAIN_S)
        tries = 0
        while True:
            tries += 1
            try:
                record = await self._store.move(job.job_id, to, skipping=skipping, **known)
            except IllegalTransition as error:
                # A commit of which we heard that it failed may have been made all the same.
                if tries == 1 or error.state != to:
                    raise _Unwanted from error
                record = await self._store.get(job.job_id)
            except NotFound as error:
                raise _Unwanted from error
            except StorageFailed as error:
                pause_s = next(pauses, _WRITE_AGAIN_S[-1] if is_end else None)
                if pause_s is None or self._hurried.is_set() or not (is_end or job.record.outlives_client):
                    raise
                log.warning("job %s cannot be made %s, next try in %g s: %s", job.job_id, to, pause_s, error.message)
                if trouble is not None:
                    job.tell(trouble)
                await _sleep_unless(self._hurried, pause_s)
                continue
            job.move(record)
            return

    async def _remove_file(self, job: LiveJob) -> None:
        """Remove a file that was stored but is no result. What is left after a failure goes at the next start."""
        key = job.record.file_key or job.unwritten.get("file_key")
        if key is None:
            return
        try:
            await self._storage.delete(key)
            await self._store.forget_file(job.job_id)
        except NotFound:
            pass
        except StorageFailed as error:
            log.warning("file of job %s was not removed: %s", job.job_id, error.message)

    async def _remove_inputs(self, job: LiveJob) -> None:
        """Remove what the request brought, unless a job of it is yet to run, here or on the next server."""
        name = job.record.inputs
        if name is None:
            return
        try:
            if all(record.is_finished for record in await self._store.group(job.record.group_id)):
                await asyncio.to_thread(self._inputs.remove, name)
        except StorageFailed as error:
            log.warning("inputs of job %s were not removed: %s", job.job_id, error.message)

    async def _silence(self, job: LiveJob) -> None:
        """Cancel a job that the engine still runs, and throw away what it sends until its last word."""
        if job.in_engine:
            self._engine.cancel(job.job_id)
        while job.in_engine:
            event = await job.next_event()
            if isinstance(event, Preview):
                self._discard(event.frames)
            elif isinstance(event, Finished):
                self._discard(*event.blocks)

    def _discard(self, *blocks: FrameBlock | SoundBlock) -> None:
        for block in blocks:
            try:
                self._media.discard(block)
            except ServiceError as error:
                log.warning("frames %s were not removed: %s", block.path, error.message)


def _deleted(job: LiveJob) -> NotFound:
    return NotFound(f"'{job.job_id}' was deleted.", code=f"{job.record.kind}_not_found")


def _preview_output(output: OutputSpec) -> OutputSpec:
    """A picture's previews have its format; a clip's are small JPEG pictures."""
    if output.format != "mp4":
        return output
    return msgspec.structs.replace(output, format="jpeg", compression=_PREVIEW_COMPRESSION)


async def _sleep_unless(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        pass
