"""What an earlier server left unfinished, put in order before the next one accepts anything.

Every job of before is afterwards in a final state, or queued to be run again from its start: the same request with the
same seed. A file is complete or absent (storage sees to that), so one that is there makes its job complete.
"""

from __future__ import annotations

import asyncio
import logging

from ..core.errors import NotFound, StorageFailed
from ..media.image_file import FILE_TYPES
from ..storage import Storage, file_key
from .inputs import InputFolders
from .record import JobRecord
from .store import JobStore

log = logging.getLogger(__name__)

MAX_INTERRUPTIONS = 5
"""How often a server may die while a job runs, before the job is taken to be the reason."""


async def recover(store: JobStore, storage: Storage, inputs: InputFolders) -> None:
    """Settle every unfinished job, then remove the files and inputs that no job needs.

    Raises StorageFailed when the job store fails; files that cannot be reached now are left to a later start.
    """
    for record in await store.fail_interrupted(result_key):
        log.warning("job %s was interrupted by the end of an earlier server", record.job_id)
    for record in await store.unfinished():
        if record.state != "queued":
            await _settle(store, storage, record)
    for record in await store.with_leftover_file():
        await _remove_file(store, storage, record)
    waiting = await store.unfinished()
    removed = await asyncio.to_thread(inputs.sweep, {record.inputs for record in waiting if record.inputs})
    if removed:
        log.info("removed the inputs of %d requests that are over", removed)


def result_key(record: JobRecord) -> str:
    """Return the storage's key of a job's file, whether it is there yet or not."""
    return file_key(record.job_id, FILE_TYPES[record.output.format].suffix)


async def _settle(store: JobStore, storage: Storage, record: JobRecord) -> None:
    """Complete, queue or fail a job that was running or encoding."""
    file_bytes = await _stored_bytes(storage, record)
    if file_bytes is not None:
        await store.move(record.job_id, "completed", file_bytes=file_bytes)
        log.info("job %s was complete when the server ended", record.job_id)
    elif record.interruptions + 1 >= MAX_INTERRUPTIONS:
        await store.move(
            record.job_id,
            "failed",
            error_code="interrupted",
            error_message=f"the server ended {MAX_INTERRUPTIONS} times while it ran this job.",
            interrupted=True,
        )
        log.error("job %s: the server ended %d times while it ran; failed", record.job_id, MAX_INTERRUPTIONS)
    else:
        await store.move(record.job_id, "queued", interrupted=True)
        log.warning("job %s was %s when the server ended; queued again", record.job_id, record.state)


async def _stored_bytes(storage: Storage, record: JobRecord) -> int | None:
    """Return the size of a job's file when it was published whole before the server ended."""
    if record.state != "encoding" or record.file_key is None:
        return None
    try:
        return await storage.size(record.file_key)
    except NotFound:
        return None
    except StorageFailed as error:
        # Made once more, and then put in the place of the old one, which is the same.
        log.warning("job %s: whether its file is there cannot be told now: %s", record.job_id, error)
        return None


async def _remove_file(store: JobStore, storage: Storage, record: JobRecord) -> None:
    assert record.file_key is not None
    try:
        await storage.delete(record.file_key)
    except (NotFound, StorageFailed) as error:
        log.warning("file of job %s cannot be deleted now: %s", record.job_id, error)
        return
    await store.forget_file(record.job_id)
