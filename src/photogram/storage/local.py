"""Files in a folder of this machine: ``<root>/ab/<key>`` by the first digits of the key's random part.

256 folders keep each at a few thousand files for a million results, and are soon all there: making a folder last waits
for the disk once more.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import IO, BinaryIO

from ..core.errors import ConfigError, NotFound, StorageFailed
from . import check_key
from .folders import make_folder, sync_folder

_CHUNK_BYTES = 256 << 10


class LocalStorage:
    """A `Storage` in a folder. A file appears there under its name only when it is whole and on the disk."""

    def __init__(self, root: Path) -> None:
        """Make the folder if need be and remove what a crash left half-written. Raises ConfigError."""
        self._root = root
        self._numbers = count()
        # Beside the files and not in /tmp: only inside one filesystem is a rename a single step.
        self._partial = root / ".partial"
        try:
            self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            for leftover in self._partial.iterdir():
                leftover.unlink()
        except OSError as error:
            raise ConfigError(f"storage folder '{root}': cannot be written ({error.strerror}).") from error

    async def start(self) -> None:
        pass

    async def put(self, key: str, data: bytes | IO[bytes], content_type: str) -> None:
        """Write, wait for the disk, and rename. The content type is the key's suffix here and is not kept."""
        await asyncio.to_thread(self._put, self._path(key), data)

    async def size(self, key: str) -> int:
        path = self._path(key)
        try:
            status = await asyncio.to_thread(path.stat)
        except OSError as error:
            raise _absent_or_failed(f"file '{key}'", error) from error
        return status.st_size

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        path = self._path(key)
        try:
            file = await asyncio.to_thread(_open_at, path, start)
            try:
                left = None if end is None else max(0, end - start)
                while left is None or left > 0:
                    chunk = await asyncio.to_thread(
                        file.read, _CHUNK_BYTES if left is None else min(_CHUNK_BYTES, left)
                    )
                    if not chunk:
                        return
                    left = None if left is None else left - len(chunk)
                    yield chunk
            finally:
                file.close()
        except OSError as error:
            raise _absent_or_failed(f"file '{key}'", error) from error

    def local_path(self, key: str) -> Path:
        return self._path(key)

    async def keys(self) -> list[str]:
        """Return the keys of all files, in no order."""
        return await asyncio.to_thread(lambda: [path.name for path in self._root.glob("??/*") if path.is_file()])

    async def url(self, key: str, seconds: int) -> str | None:
        return None

    async def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except OSError as error:
            raise _failed(f"file '{key}'", error) from error

    async def check_writable(self) -> None:
        await asyncio.to_thread(self._check)

    async def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        digits = check_key(key).partition("_")[2]
        return self._root / digits[:2] / key

    def _put(self, path: Path, data: bytes | IO[bytes]) -> None:
        # Two writers of one key must not share a partial file.
        partial = self._partial / f"{path.name}.{next(self._numbers)}"
        try:
            written = partial
            try:
                _write(partial, data)
                make_folder(path.parent)
                os.replace(partial, path)
                written = path
                sync_folder(path.parent)
            except BaseException:
                written.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise _failed(f"file '{path.name}'", error) from error

    def _check(self) -> None:
        probe = self._partial / f"probe.{secrets.token_hex(4)}"
        try:
            try:
                _write(probe, b"\0" * 4096)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(f"storage folder '{self._root}'", error) from error


def _write(path: Path, data: bytes | IO[bytes]) -> None:
    """Write a new file and return when it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if isinstance(data, bytes):
            file.write(data)
        else:
            shutil.copyfileobj(data, file, _CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _open_at(path: Path, start: int) -> BinaryIO:
    file = path.open("rb")
    file.seek(start)
    return file


def _absent_or_failed(what: str, error: OSError) -> NotFound | StorageFailed:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{what}: not there.", code="file_not_found")
    return _failed(what, error)


def _failed(what: str, error: OSError) -> StorageFailed:
    return StorageFailed(f"{what}: {error.strerror or error}.")
