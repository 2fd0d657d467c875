"""The durable list of jobs: what was accepted is here before its client hears of it.

SQLAlchemy Core on SQLite by default; the statements are portable. A caller that is cancelled while it waits may find
its change made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import URL, Connection, Row, bindparam, delete, func, insert, or_, select, update

from ..core.errors import NotFound, RequestError
from ..core.request import GenerateRequest, JSONValue, OutputSpec
from .announce import announce
from .prepared import Prepared
from .record import FINISHED, UNFINISHED, IllegalTransition, JobKind, JobRecord, JobState, sources
from .schema import jobs, lock_folder, open_database
from .transactions import Transactions

Result = TypeVar("Result")

STORE_FILE = "jobs.sqlite3"
# Columns that hold JSON, and of what.
_JSON: dict[str, msgspec.json.Decoder[Any]] = {
    "request": msgspec.json.Decoder(GenerateRequest),
    "output": msgspec.json.Decoder(OutputSpec),
    "warnings": msgspec.json.Decoder(tuple[str, ...]),
    "facts": msgspec.json.Decoder(dict[str, JSONValue]),
}
MAX_PAGE = 1000
_COLUMNS = tuple("index" if column.name == "index_in_group" else column.name for column in jobs.c)
_INSERT = Prepared(
    insert(jobs).values({column.name: bindparam(column.name) for column in jobs.c if not column.primary_key})
)
_GET = Prepared(select(jobs).where(jobs.c.job_id == bindparam("job")))
_REMEMBERED_DELETIONS = 10_000


@dataclass(frozen=True, slots=True)
class Totals:
    """What finished jobs amount to."""

    num_jobs: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a deleted job stood in the order of acceptance."""

    position: int
    kind: str
    owner: str


class JobStore:
    """Jobs in a database. Built with `open_store` (a data folder) or `JobStore(url)`; `close` it."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, lock: int | None = None) -> None:
        """Open the database, made when it is new. Raises ConfigError when it cannot be used."""
        self._clock = clock
        self._lock = lock
        self._transactions = Transactions(open_database(url))
        self._deleted: dict[str, _Place] = {}

    async def create(self, records: Sequence[JobRecord]) -> None:
        """Keep new jobs, all or none; when this returns they survive this process, and such as outlive their client a
        power cut too.

        Raises Conflict when the owner has used the idempotency key before, StorageFailed when the disk refuses.
        """
        rows = [_row(record) for record in records]
        if rows:
            promise = any(record.outlives_client for record in records)
            await self._run(lambda connection: _insert(connection, rows), promise=promise)

    async def move(
        self,
        job_id: str,
        to: JobState,
        *,
        started_at: float | None = None,
        finished_at: float | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        error_param: str | None = None,
        file_key: str | None = None,
        content_type: str | None = None,
        file_bytes: int | None = None,
        run_s: float | None = None,
        prompt_tokens: int | None = None,
        image_tokens: int | None = None,
        warnings: tuple[str, ...] | None = None,
        interrupted: bool = False,
        skipping: bool = False,
    ) -> JobRecord:
        """Move a job to a state, with what became known (None: unchanged), and return its new record.

        Of two writers that want to move the same job one wins; the other gets IllegalTransition. Beginning and end
        are stamped with the store's clock unless given, each beginning counts as an attempt, and `interrupted` adds
        to the interruptions. `skipping` is for a job whose moves before this one were not written. With a final state
        goes what is owed for it (`jobs/announce`). Raises NotFound.
        """
        if to == "failed" and (error_code is None or error_message is None):
            raise ValueError("a failed job needs error_code and error_message")
        changes: dict[str, str | float | int | None] = {
            "started_at": self._clock() if to == "running" and started_at is None else started_at,
            "finished_at": self._clock() if to in FINISHED and finished_at is None else finished_at,
            "error_code": error_code,
            "error_message": error_message,
            "error_param": error_param,
            "file_key": file_key,
            "content_type": content_type,
            "file_bytes": file_bytes,
            "run_s": run_s,
            "prompt_tokens": prompt_tokens,
            "image_tokens": image_tokens,
            "warnings": None if warnings is None else msgspec.json.encode(warnings).decode(),
        }
        known: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if "started_at" in known:
            known["attempts"] = 1
        if interrupted:
            known["interruptions"] = 1
        states = sources(to, skipping=skipping)
        return await self._run(lambda connection: _move(connection, job_id, states, to, known), promise=to in FINISHED)

    async def get(self, job_id: str) -> JobRecord:
        """Return one job. Raises NotFound."""
        return await self._run(lambda connection: _get(connection, job_id))

    async def group(self, group_id: str) -> tuple[JobRecord, ...]:
        """Return the jobs of one API object in their order; none for an unknown id."""
        query = select(jobs).where(jobs.c.group_id == group_id).order_by(jobs.c.index_in_group)
        return await self._run(lambda connection: _records(connection.execute(query).all()))

    async def with_idempotency_key(self, owner: str, key: str) -> tuple[JobRecord, ...]:
        """Return the jobs that this owner made under a key, in their order."""
        query = select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)
        query = query.order_by(jobs.c.index_in_group)
        return await self._run(lambda connection: _records(connection.execute(query).all()))

    async def unfinished(self, kind: JobKind | None = None) -> tuple[JobRecord, ...]:
        """Return what is queued, running or encoding, oldest first."""
        query = select(jobs).where(jobs.c.state.in_(UNFINISHED)).order_by(jobs.c.position)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        return await self._run(lambda connection: _records(connection.execute(query).all()))

    async def list(
        self,
        *,
        kind: JobKind | None = None,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[JobRecord, ...]:
        """Return up to `limit` jobs, newest first unless `order` is ``asc``, from the one that follows job `after`.

        The order is that of acceptance. `after` may have been deleted since this store was opened: who deletes page by
        page goes on. Raises RequestError naming ``limit`` or ``after`` (unknown, or another owner's).
        """
        if not 1 <= limit <= MAX_PAGE:
            raise RequestError(f"limit {limit}: must be from 1 to {MAX_PAGE}.", param="limit")
        query = select(jobs).order_by(jobs.c.position if order == "asc" else jobs.c.position.desc()).limit(limit)
        place = select(jobs.c.position).where(jobs.c.job_id == after)
        if kind is not None:
            query, place = query.where(jobs.c.kind == kind), place.where(jobs.c.kind == kind)
        if owner is not None:
            query, place = query.where(jobs.c.owner == owner), place.where(jobs.c.owner == owner)

        def page(connection: Connection) -> tuple[JobRecord, ...]:
            if after is None:
                return _records(connection.execute(query).all())
            position = connection.scalar(place)
            if position is None and after in self._deleted:
                gone = self._deleted[after]
                position = gone.position if kind in (None, gone.kind) and owner in (None, gone.owner) else None
            if position is None:
                raise RequestError(f"after '{after}': no such job.", param="after")
            beyond = jobs.c.position > position if order == "asc" else jobs.c.position < position
            return _records(connection.execute(query.where(beyond)).all())

        return await self._run(page)

    async def oldest_finished(self, limit: int, after: JobRecord | None = None) -> tuple[JobRecord, ...]:
        """Return up to `limit` finished jobs, those that ended first in front, from the one that follows `after`."""
        query = select(jobs).where(jobs.c.state.in_(FINISHED))
        if after is not None:
            # By value, for that row may have been deleted since.
            same_time = (jobs.c.finished_at == after.finished_at) & (jobs.c.job_id > after.job_id)
            query = query.where((jobs.c.finished_at > after.finished_at) | same_time)
        query = query.order_by(jobs.c.finished_at, jobs.c.job_id).limit(limit)
        return await self._run(lambda connection: _records(connection.execute(query).all()))

    async def totals(self) -> Totals:
        """Return how many jobs are finished and how large their files are together."""
        query = select(func.count(), func.coalesce(func.sum(jobs.c.file_bytes), 0)).where(jobs.c.state.in_(FINISHED))

        def totals(connection: Connection) -> Totals:
            num_jobs, file_bytes = connection.execute(query).one()
            return Totals(num_jobs=num_jobs, file_bytes=int(file_bytes))

        return await self._run(totals)

    async def delete(self, job_id: str) -> bool:
        """Forget a job in whatever state; False when there was none. Its file is the caller's affair."""

        def forget(connection: Connection) -> _Place | None:
            row = connection.execute(select(jobs.c.position, jobs.c.kind, jobs.c.owner).where(jobs.c.job_id == job_id))
            place = row.one_or_none()
            connection.execute(delete(jobs).where(jobs.c.job_id == job_id))
            return None if place is None else _Place(*place)

        place = await self._run(forget, promise=True)
        if place is None:
            return False
        self._deleted[job_id] = place
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            del self._deleted[next(iter(self._deleted))]
        return True

    async def fail_interrupted(
        self, file_of: Callable[[JobRecord], str | None] = lambda record: record.file_key
    ) -> tuple[JobRecord, ...]:
        """Fail the unfinished jobs that do not outlive their client, and return them as they are now.

        For the start of a server, before it accepts anything: such a job has lost its client. `file_of` tells under
        which key its file may be; that file may be complete, half-way or absent: delete it.
        """
        now = self._clock()
        alone = (jobs.c.kind == "image") & jobs.c.idempotency_key.is_(None)
        lost = select(jobs).where(alone, jobs.c.state.in_(UNFINISHED)).order_by(jobs.c.position)

        def fail(connection: Connection) -> tuple[JobRecord, ...]:
            failed = []
            for record in _records(connection.execute(lost).all()):
                changes: dict[str, Any] = {
                    "error_code": "interrupted",
                    "error_message": "the server stopped before the job was finished; send the request again.",
                    "finished_at": now,
                }
                key = file_of(record)
                if key is not None:
                    changes["file_key"] = key
                failed.append(_move(connection, record.job_id, UNFINISHED, "failed", changes))
            return tuple(failed)

        return await self._run(fail, promise=True)

    async def transact(self, work: Callable[[Connection], Result], *, promise: bool = False) -> Result:
        """Run statements on another table of the database, in one transaction and in the store's own thread.

        `promise` waits for the disk. Raises Conflict and StorageFailed as the store's own methods do.
        """
        return await self._run(work, promise=promise)

    async def with_leftover_file(self) -> tuple[JobRecord, ...]:
        """Return the failed and cancelled jobs whose row still names a file."""
        query = select(jobs).where(jobs.c.state.in_(("failed", "cancelled")), jobs.c.file_key.is_not(None))
        return await self._run(lambda connection: _records(connection.execute(query).all()))

    async def forget_file(self, job_id: str) -> None:
        """Note that the file of a job without result was removed. An unknown or completed job is left as it is."""
        statement = update(jobs).where(jobs.c.job_id == job_id, jobs.c.state.in_(("failed", "cancelled")))
        await self._run(lambda connection: connection.execute(statement.values(file_key=None)) and None)

    async def check_writable(self) -> None:
        """Raise StorageFailed when nothing could be committed now."""
        nothing = update(jobs).where(jobs.c.position == -1).values(attempts=0)
        await self._run(lambda connection: connection.execute(nothing) and None, promise=True)

    async def close(self) -> None:
        """Finish what was asked for, close the database and let the next server have the folder."""
        await self._transactions.close()
        if self._lock is not None:
            os.close(self._lock)

    async def _run(self, work: Callable[[Connection], Result], *, promise: bool = False) -> Result:
        return await self._transactions.run(work, promise=promise)


def open_store(data_dir: Path, *, clock: Callable[[], float] = time.time) -> JobStore:
    """Open the store of a data folder, and keep other servers out of the folder until it is closed.

    Raises ConfigError when the folder cannot be written or is in use, and when the store is damaged, newer than this
    photogram or a database of something else; nothing is changed then.
    """
    lock = lock_folder(data_dir)
    try:
        url = URL.create("sqlite", database=str(data_dir / STORE_FILE))
        return JobStore(url.render_as_string(hide_password=False), clock=clock, lock=lock)
    except BaseException:
        os.close(lock)
        raise


def _insert(connection: Connection, rows: Sequence[Mapping[str, object]]) -> None:
    for row in rows:
        _INSERT.run(connection, row)


@cache
def _moving(sources: tuple[JobState, ...], to: JobState, changed: frozenset[str]) -> Prepared:
    """Return the statement that moves a job from one of the states and sets these columns, and returns the row that it
    moved.

    The check and the change are one statement: of two writers the second finds no row to change.
    """
    may_move = or_(*(jobs.c.state == source for source in sources))
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in changed}
    for counted in ("attempts", "interruptions"):
        if counted in changed:
            values[counted] = jobs.c[counted] + values[counted]
    moving = update(jobs).where(jobs.c.job_id == bindparam("job"), may_move).values(state=to, **values)
    return Prepared(moving.returning(*jobs.c))


def _move(
    connection: Connection, job_id: str, sources: tuple[JobState, ...], to: JobState, changes: Mapping[str, Any]
) -> JobRecord:
    """Move a job. `changes` are new values by column, of `attempts` and `interruptions` how many are added."""
    known = {"job": job_id} | {f"new_{name}": value for name, value in changes.items()}
    row = _moving(sources, to, frozenset(changes)).run(connection, known)
    if row is None:
        raise IllegalTransition(job_id, _get(connection, job_id).state, to)
    record = _record(row)
    if record.is_finished:
        announce(connection, record)
    return record


def _get(connection: Connection, job_id: str) -> JobRecord:
    row = _GET.run(connection, {"job": job_id})
    if row is None:
        raise NotFound(f"no job '{job_id}'.")
    return _record(row)


def _records(rows: Sequence[Row[Any]]) -> tuple[JobRecord, ...]:
    return tuple(_record(row) for row in rows)


def _row(record: JobRecord) -> dict[str, Any]:
    row = msgspec.structs.asdict(record)
    row["index_in_group"] = row.pop("index")
    for name in _JSON:
        row[name] = msgspec.json.encode(row[name]).decode()
    return row


def _record(row: Sequence[Any]) -> JobRecord:
    """Return a row, with all its columns in the table's order, as a record."""
    fields = dict(zip(_COLUMNS, row, strict=True))
    del fields["position"]
    for name, decoder in _JSON.items():
        fields[name] = decoder.decode(fields[name])
    return JobRecord(**fields)
