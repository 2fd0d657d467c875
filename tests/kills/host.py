"""A host that ends itself by `kill -9` at a chosen passage of a chosen point of a job's life.

``python -m kills.host PORT DATA_DIR POINT PASSAGE [MODEL]``; with the point ``none`` it goes on until somebody else
kills it. With a model the worker is the real one, else a stand-in.
"""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from photogram.core.config import ServeConfig
from photogram.engine.worker_engine import WorkerEngine
from photogram.engine.worker_process import WORKER_COMMAND
from photogram.jobs.store import JobStore
from photogram.media import pool
from photogram.server.attendant import Attendant
from photogram.server.live import LiveJob
from photogram.server.run import serve
from photogram.storage import local

NOBODY = "127.0.0.1:9"
"""Where a webhook may be, but nobody listens: events stay in the outbox to be counted."""

POINTS = (
    "accepting",  # before the row is committed
    "accepted",  # after the commit, before anything else
    "queued",  # given to the engine
    "step",
    "encoding",  # the frames are there, the file is not
    "publishing",  # half of the file is written
    "published",  # the file is lasting, the row says encoding
    "committing",  # in the thread of the store, before the row becomes completed
    "committed",  # the row is completed, the client has not heard
)


def main() -> None:
    port, data_dir, point, passage = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    if point != "none":
        arm(point, passage)
    config = ServeConfig(port=port, data_dir=data_dir, log_level="warning", allow_url_host=(NOBODY,))
    command: tuple[str, ...] = (sys.executable, "-m", "kills.stand_in_worker")
    if sys.argv[5:]:
        config = replace(config, model_path=sys.argv[5], warmup=False)
        command = WORKER_COMMAND
    asyncio.run(serve(config, lambda config, folder: WorkerEngine(config, folder, worker_command=command)))


def arm(point: str, passage: int) -> None:
    """Make the `passage`-th passage of a point, 1 being the first, the end of this process."""
    left = passage

    def die() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    create, move, put = JobStore.create, JobStore.move, local.LocalStorage._put
    submit, step, write = Attendant._submit, LiveJob.step, local._write

    async def dying_create(store, records):
        if point == "accepting":
            die()
        await create(store, records)
        if point == "accepted":
            die()

    async def dying_move(store, job_id, to, **known):
        if point == "committing" and to == "completed":
            return await move(_dying_in_transaction(store, die), job_id, to, **known)
        record = await move(store, job_id, to, **known)
        if point == "committed" and to == "completed":
            die()
        return record

    def dying_write(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        die()
        path.unlink()
        write(path, data)

    def before(function: Callable) -> Callable:
        def passing(*arguments):
            die()
            return function(*arguments)

        return passing

    def after(function: Callable, name: str) -> Callable:
        def passing(*arguments, **known):
            result = function(*arguments, **known)
            if point == name:
                die()
            return result

        return passing

    JobStore.create = dying_create
    JobStore.move = dying_move
    Attendant._submit = after(submit, "queued")
    LiveJob.step = after(step, "step")
    local.LocalStorage._put = after(put, "published")
    if point == "encoding":
        pool.encode_image, pool.encode_mp4 = before(pool.encode_image), before(pool.encode_mp4)
    if point == "publishing":
        local._write = dying_write


def _dying_in_transaction(store: JobStore, die: Callable[[], None]) -> JobStore:
    """The store, but its transactions pass `die` with their statements run and nothing committed."""
    dying = copy.copy(store)

    async def run(work, *, promise=False):
        def and_die(connection):
            result = work(connection)
            die()
            return result

        return await store._run(and_die, promise=promise)

    dying._run = run
    return dying


if __name__ == "__main__":
    main()
