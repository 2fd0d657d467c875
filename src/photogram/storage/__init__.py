"""Where finished files live: one protocol, and one file beside this for each place.

Keys are made here from a job's own random id; no string of a client ever becomes a key or a path.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from ..core.errors import StorageFailed

_KEY = re.compile(r"[a-z]{2,10}_[0-9a-f]{32}\.[a-z0-9]{2,5}")


class Storage(Protocol):
    """Whole files by key: written once, read in ranges, deleted. `LocalStorage` (storage/local.py) is a folder,
    `ObjectStorage` (storage/object_store.py) S3, Google's and Azure's.

    Every method raises StorageFailed when the place cannot do it now or when `key` is no key.
    """

    async def start(self) -> None:
        """Take up what an earlier server left; to be called once, before anything else."""

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """Keep a file. When this returns it is whole and lasting; when it raises nothing of it is left. An old file
        of the same key is replaced in one step."""

    async def size(self, key: str) -> int:
        """Return the file's bytes. Raises NotFound."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to and without `end` (None: to the last). Raises NotFound at the first."""

    def local_path(self, key: str) -> Path | None:
        """Return the file's place on this machine, for sending it without reading it; None where it has none."""

    async def url(self, key: str, seconds: int) -> str | None:
        """Return a URL that gives the file for some seconds without this server; None where there is none (now)."""

    async def delete(self, key: str) -> None:
        """Remove a file; one that is not there is fine."""

    async def check_writable(self) -> None:
        """Raise StorageFailed when nothing could be put now."""

    async def close(self) -> None:
        """Let go of connections."""


def file_key(job_id: str, suffix: str) -> str:
    """Return the key of a job's file: its id and, without a dot, the format's suffix. Raises StorageFailed."""
    return check_key(f"{job_id}.{suffix}")


def check_key(key: str) -> str:
    """Return `key` when it has the form that `file_key` gives. Raises StorageFailed for anything else."""
    if not _KEY.fullmatch(key):
        raise StorageFailed(f"file key {key[:80]!r}: must be a job's id and a suffix, as in 'img_<32 hex digits>.png'.")
    return key
