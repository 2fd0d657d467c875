"""Forgetting finished work: by age and by the size of its files, oldest first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..core.config import Keep
from ..core.errors import NotFound, StorageFailed
from ..storage import Storage
from .record import JobRecord
from .store import JobStore

_log = logging.getLogger(__name__)

_BATCH = 200


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one pass has deleted."""

    num_jobs: int
    file_bytes: int


async def prune(store: JobStore, storage: Storage, keep: Keep, now: float) -> Pruned:
    """Delete finished jobs with their files until what is left is young and small enough for `keep`.

    `now` is seconds since the epoch. A file goes before its row, so that a crash between the two leaves a row that
    the next pass meets again and never a file that nobody knows. A file that cannot be deleted keeps its row and
    does not keep others from going.
    """
    num_jobs, deleted_bytes = 0, 0
    if keep.age_s is None and keep.size_bytes is None:
        return Pruned(num_jobs, deleted_bytes)
    left_bytes = (await store.totals()).file_bytes
    last: JobRecord | None = None
    while batch := await store.oldest_finished(_BATCH, after=last):
        for job in batch:
            last = job
            too_old = keep.age_s is not None and (job.finished_at or 0.0) < now - keep.age_s
            too_much = keep.size_bytes is not None and left_bytes > keep.size_bytes
            if not too_old and not too_much:
                return Pruned(num_jobs, deleted_bytes)  # every following job is younger
            if not too_old and not job.file_bytes:
                continue  # would make no room
            if await _forget(store, storage, job):
                num_jobs += 1
                deleted_bytes += job.file_bytes or 0
                left_bytes -= job.file_bytes or 0
    return Pruned(num_jobs, deleted_bytes)


async def keep_pruning(
    store: JobStore, storage: Storage, keep: Keep, *, every_s: float = 60.0, clock: Callable[[], float] = time.time
) -> None:
    """Run a pass now and every `every_s` seconds until cancelled; a pass that fails is logged and made up for."""
    while True:
        try:
            pruned = await prune(store, storage, keep, clock())
        except StorageFailed as error:
            _log.warning("finished work could not be pruned, next try in %.0f s: %s", every_s, error)
        else:
            if pruned.num_jobs:
                _log.info("pruned %d finished jobs, %d bytes", pruned.num_jobs, pruned.file_bytes)
        await asyncio.sleep(every_s)


async def _forget(store: JobStore, storage: Storage, job: JobRecord) -> bool:
    if job.file_key is not None:
        try:
            await storage.delete(job.file_key)
        except NotFound:
            pass
        except StorageFailed as error:
            _log.warning("file of finished job %s cannot be deleted, its row is kept: %s", job.job_id, error)
            return False
    return await store.delete(job.job_id)
