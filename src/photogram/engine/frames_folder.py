"""A private folder in shared memory where the worker leaves pixels for the host."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# Containers often give 64 MB; a long clip is larger than that.
ENOUGH_BYTES = 1 << 30


@contextmanager
def frames_folder() -> Iterator[Path]:
    """Make the folder, readable by this user only, and remove it at the end.

    In shared memory where there is room, else among the temporary files. Folders that hosts of this user left behind
    when they were killed are removed too.
    """
    root = _root()
    _remove_orphans(root)
    folder = root / f"photogram-{os.getuid()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _root() -> Path:
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        room = os.statvfs(SHARED_MEMORY)
        if room.f_bavail * room.f_frsize >= ENOUGH_BYTES:
            return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _remove_orphans(root: Path) -> None:
    for folder in root.glob(f"photogram-{os.getuid()}-*"):
        match = re.fullmatch(r"photogram-\d+-(\d+)-[0-9a-f]{8}", folder.name)
        if match and not Path(f"/proc/{match.group(1)}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
