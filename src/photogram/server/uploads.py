"""Files that clients upload to name them by id later: kept for a while, each its owner's alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..core.config import Keep
from ..core.errors import NotFound, RequestError, ServiceError
from ..jobs.record import new_id
from ..jobs.uploads import UploadRecord, UploadStore
from ..storage import file_key
from ..storage.local import LocalStorage
from .forms import Upload

log = logging.getLogger(__name__)

MAX_FILES = 10_000
"""Files of one owner."""
_PREFIX = "file"
_SWEEP_EVERY_S = 60.0


class Uploads:
    """Rows and bytes together. A file's bytes are there before its row and go before it, so that a row always has
    bytes; bytes without a row, of a crash in between, go at the next start."""

    def __init__(
        self, rows: UploadStore, files: LocalStorage, keep: Keep, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`keep` bounds the age of a file, and the bytes of one owner."""
        self.rows = rows
        self._files = files
        self._keep = keep
        self._clock = clock

    async def open(self) -> None:
        """Make ready, and remove what a crash left."""
        await self.rows.open()
        known = {_key(file_id) for file_id in await self.rows.ids()}
        for key in await self._files.keys():
            if key not in known:
                await self._files.delete(key)

    async def create(self, upload: Upload, owner: str, purpose: str, expires_after_s: int | None) -> UploadRecord:
        """Keep an upload and return its row. Raises RequestError beyond the owner's bounds, StorageFailed."""
        if upload.size_bytes == 0:
            raise RequestError("'file' is empty.", param="file")
        now = self._clock()
        ages = [age_s for age_s in (expires_after_s, self._keep.age_s) if age_s is not None]
        record = UploadRecord(
            file_id=new_id(_PREFIX),
            owner=owner,
            filename=upload.filename or "upload",
            purpose=purpose,
            size_bytes=upload.size_bytes,
            created_at=now,
            expires_at=now + min(ages) if ages else None,
        )
        key = _key(record.file_id)
        await self._files.put(key, upload.file, "application/octet-stream")
        try:
            await self.rows.create(record, max_files=MAX_FILES, max_bytes=self._keep.size_bytes)
        except BaseException:
            await self._files.delete(key)
            raise
        return record

    async def get(self, file_id: str, owner: str) -> UploadRecord:
        """Return an owner's file. Raises NotFound, also for one whose time is over."""
        record = await self.rows.get(file_id, owner)
        if record.expires_at is not None and record.expires_at <= self._clock():
            raise NotFound(f"file '{file_id}' has expired.", param="file_id", code="file_not_found")
        return record

    def path(self, record: UploadRecord) -> Path:
        """Return where a file's bytes lie. Raises NotFound when they are gone."""
        path = self._files.local_path(_key(record.file_id))
        if not path.is_file():
            raise NotFound(f"the bytes of file '{record.file_id}' are gone.", param="file_id", code="file_not_found")
        return path

    async def open_file(self, file_id: str, owner: str) -> IO[bytes]:
        """Open a file for reading; the caller closes it. Raises NotFound."""
        return self.path(await self.get(file_id, owner)).open("rb")

    async def delete(self, file_id: str, owner: str) -> None:
        """Remove an owner's file. Raises NotFound."""
        record = await self.rows.get(file_id, owner)
        await self._remove(record)

    async def keep_sweeping(self) -> None:
        """Remove what has expired, now and every minute, until cancelled."""
        while True:
            try:
                for record in await self.rows.expired(self._clock()):
                    await self._remove(record)
            except ServiceError as error:
                log.warning("expired uploads could not be removed, next try in %.0f s: %s", _SWEEP_EVERY_S, error)
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def _remove(self, record: UploadRecord) -> None:
        await self._files.delete(_key(record.file_id))
        await self.rows.delete(record.file_id)


def _key(file_id: str) -> str:
    return file_key(file_id, "bin")
