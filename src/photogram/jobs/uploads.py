"""Rows of files that clients upload to be used later by their ids. The bytes lie in a storage of their own.

The table is this file's own affair, and lies in the job store's database.
"""

from __future__ import annotations

import builtins
from typing import Any, Literal

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    func,
    insert,
    select,
)
from sqlalchemy import delete as delete_rows

from ..core.errors import NotFound, RequestError
from .store import JobStore

uploads = Table(
    "uploads",
    MetaData(),
    Column("position", Integer, primary_key=True, autoincrement=True),
    Column("file_id", String(64), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Index("uploads_by_owner", "owner", "position"),
    Index("uploads_by_end", "expires_at"),
    sqlite_autoincrement=True,
)


class UploadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One uploaded file. Times are seconds since the epoch; `filename` is the client's, for showing only."""

    file_id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: float
    expires_at: float | None


class UploadStore:
    """The rows, in the job store's database and thread."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def open(self) -> None:
        """Make the table where it is missing; to be called before anything else."""
        await self._store.transact(lambda connection: uploads.create(connection, checkfirst=True))

    async def create(self, record: UploadRecord, *, max_files: int, max_bytes: int | None) -> None:
        """Keep a row, unless its owner would then have more than the bounds allow. Raises RequestError."""

        def create(connection: Connection) -> None:
            total = select(func.count(), func.coalesce(func.sum(uploads.c.size_bytes), 0))
            num_files, num_bytes = connection.execute(total.where(uploads.c.owner == record.owner)).one()
            if num_files >= max_files:
                raise _full(f"{num_files} files are kept for this key, and {max_files} are allowed")
            if max_bytes is not None and num_bytes + record.size_bytes > max_bytes:
                kept = (
                    f"{num_bytes} bytes are kept for this key, and with this file they would be more than {max_bytes}"
                )
                raise _full(kept)
            connection.execute(insert(uploads), msgspec.structs.asdict(record))

        await self._store.transact(create, promise=True)

    async def get(self, file_id: str, owner: str) -> UploadRecord:
        """Return one owner's file. Raises NotFound."""
        query = select(uploads).where(uploads.c.file_id == file_id, uploads.c.owner == owner)
        rows = await self._select(query)
        if not rows:
            raise NotFound(f"no file {file_id[:100]!r}.", param="file_id", code="file_not_found")
        return rows[0]

    async def list(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> builtins.list[UploadRecord]:
        """Return up to `limit` files, from the one that follows `after`. Raises RequestError for an unknown `after`."""
        query = select(uploads).where(uploads.c.owner == owner).limit(limit)
        query = query.order_by(uploads.c.position if order == "asc" else uploads.c.position.desc())
        if purpose is not None:
            query = query.where(uploads.c.purpose == purpose)
        if after is not None:
            place = select(uploads.c.position).where(uploads.c.owner == owner, uploads.c.file_id == after)
            position = await self._store.transact(lambda connection: connection.scalar(place))
            if position is None:
                raise RequestError(f"after '{after[:100]}': no such file.", param="after")
            query = query.where(uploads.c.position > position if order == "asc" else uploads.c.position < position)
        return await self._select(query)

    async def expired(self, now: float) -> builtins.list[UploadRecord]:
        """Return every owner's files whose time is over."""
        return await self._select(select(uploads).where(uploads.c.expires_at <= now))

    async def ids(self) -> frozenset[str]:
        """Return the ids of all files."""
        query = select(uploads.c.file_id)
        return await self._store.transact(lambda connection: frozenset(connection.scalars(query).all()))

    async def delete(self, file_id: str) -> None:
        """Forget a file; one that is not there is fine."""
        statement = delete_rows(uploads).where(uploads.c.file_id == file_id)
        await self._store.transact(lambda connection: connection.execute(statement) and None, promise=True)

    async def _select(self, query: Select[Any]) -> builtins.list[UploadRecord]:
        def rows(connection: Connection) -> builtins.list[UploadRecord]:
            return [
                UploadRecord(**{name: value for name, value in row.items() if name != "position"})
                for row in connection.execute(query).mappings()
            ]

        return await self._store.transact(rows)


def _full(reason: str) -> RequestError:
    return RequestError(f"'file': {reason} (--keep-uploads); delete some first.", param="file", code="too_many_files")
