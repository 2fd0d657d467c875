"""Files in an object store: S3 and what speaks its language, Google Cloud Storage, Azure.

A file is first written to a folder of this machine, so a job is complete when its file is lasting, whatever the object
store does at that moment. The folder is the list of what is still to be uploaded: it survives a restart, and a file
leaves it when the store has confirmed it. Until then it is read from the folder.
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from ..core.errors import ConfigError, NotFound, StorageFailed
from . import check_key
from .local import LocalStorage

log = logging.getLogger(__name__)

CloudStore = S3Store | GCSStore | AzureStore

_CHUNK_BYTES = 1 << 20
_AT_ONCE = 4
_URL_WAIT_S = 5.0
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class ObjectStorage:
    """A `Storage` in an object store, with a `LocalStorage` before it. One per server; lives on the event loop."""

    def __init__(self, url: str, local: LocalStorage, *, first_wait_s: float = _FIRST_WAIT_S) -> None:
        """`url` is ``s3://bucket/prefix`` (or gs://, az://); endpoint and credentials come from the environment
        variables that the store's own tools read. Raises ConfigError for a URL or settings that cannot be used."""
        self._store = _opened(url)
        self._local = local
        self._first_wait_s = first_wait_s
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._uploads: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Go on with what an earlier server has not uploaded."""
        for key in await self._local.keys():
            self._begin_upload(key)

    @property
    def num_waiting(self) -> int:
        """Files that the store has not confirmed."""
        return len(self._uploads)

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """Keep a file in the folder, and begin its upload; one of an older file of the key is given up."""
        await self._stop_upload(key)
        await self._local.put(key, data, content_type)
        self._begin_upload(key)

    async def size(self, key: str) -> int:
        try:
            return await self._local.size(key)
        except NotFound:
            pass
        try:
            return int((await obstore.head_async(self._store, key))["size"])
        except (BaseError, OSError) as error:
            raise _absent_or_failed(key, error) from error

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        began = False
        try:
            async for chunk in self._local.read(key, start, end):
                began = True
                yield chunk
            return
        except NotFound:
            if began:
                raise
        size = await self.size(key)
        end = size if end is None else min(end, size)
        while start < end:
            step = min(_CHUNK_BYTES, end - start)
            try:
                chunk = bytes(await obstore.get_range_async(self._store, key, start=start, length=step))
            except (BaseError, OSError) as error:
                raise _absent_or_failed(key, error) from error
            start += len(chunk)
            yield chunk

    def local_path(self, key: str) -> Path | None:
        return None

    async def url(self, key: str, seconds: int) -> str | None:
        """Return a signed URL that gives the file for some time, after a short wait for an upload that is under way;
        None where the store has not confirmed the file by then."""
        upload = self._uploads.get(check_key(key))
        if upload is not None and not (await asyncio.wait({upload}, timeout=_URL_WAIT_S))[0]:
            return None
        try:
            return await obstore.sign_async(self._store, "GET", key, timedelta(seconds=seconds))
        except (BaseError, OSError, ValueError) as error:
            log.warning("no signed URL for file %s: %s", key, _reason(error))
            return None

    async def delete(self, key: str) -> None:
        await self._stop_upload(key)
        await self._local.delete(key)
        try:
            await obstore.delete_async(self._store, key)
        except (BaseError, OSError) as error:
            failure = _absent_or_failed(key, error)
            if isinstance(failure, StorageFailed):
                raise failure from error

    async def check_writable(self) -> None:
        await self._local.check_writable()

    async def close(self) -> None:
        """Let go; what is not uploaded is when the next server starts."""
        tasks = list(self._uploads.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _stop_upload(self, key: str) -> None:
        upload = self._uploads.pop(check_key(key), None)
        if upload is not None:
            upload.cancel()
            await asyncio.wait({upload})

    def _begin_upload(self, key: str) -> None:
        self._uploads[key] = asyncio.create_task(self._upload(key))

    async def _upload(self, key: str) -> None:
        """Upload a file, however often it takes, and let go of the copy here."""
        wait_s = self._first_wait_s
        while True:
            try:
                async with self._slots:
                    content_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
                    attributes = {"Content-Type": content_type}
                    await obstore.put_async(self._store, key, self._local.local_path(key), attributes=attributes)
                    # Only what can be read there is let go of here.
                    confirmed = (await obstore.head_async(self._store, key))["size"]
                if confirmed == await self._local.size(key):
                    break
                log.warning("file %s: the object store holds %d bytes of it", key, confirmed)
            except NotFound:
                break  # deleted here meanwhile
            except (BaseError, OSError, StorageFailed) as error:
                if not self._local.local_path(key).exists():
                    break
                log.warning("file %s is not uploaded, next try in %.0f s: %s", key, wait_s, _reason(error))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        try:
            await self._local.delete(key)
        except StorageFailed as error:
            log.warning("file %s is uploaded, its copy here cannot be removed: %s", key, error)
        self._uploads.pop(key, None)


def _opened(url: str) -> CloudStore:
    stores: dict[str, type[S3Store] | type[GCSStore] | type[AzureStore]] = {
        "s3": S3Store,
        "gs": GCSStore,
        "az": AzureStore,
    }
    kind = stores.get(url.partition("://")[0])
    if kind is None:
        raise ConfigError(
            f"--storage '{url}': expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX."
        )
    try:
        return kind.from_url(
            url,
            client_options={"allow_http": True, "timeout": "30s", "connect_timeout": "5s"},
            retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=10)},
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"--storage '{url}': cannot be used ({_reason(error)}).") from error


def _absent_or_failed(key: str, error: Exception) -> NotFound | StorageFailed:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"file '{key}': not there.", code="file_not_found")
    return StorageFailed(f"file '{key}': the object store cannot be used now.")


def _reason(error: Exception) -> str:
    """Return an error's first line; the following ones may quote what was sent."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
