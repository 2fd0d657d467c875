"""Folders of pictures and clips that unfinished jobs need: one for each request, named in the rows of its jobs.

A folder is there before the rows that name it and goes after their last end, so a crash between leaves at most a
folder that no row needs: the next start removes it.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from ..core.errors import StorageFailed
from ..storage.folders import make_folder, sync_folder

log = logging.getLogger(__name__)

INPUTS = "inputs"
"""The folder's name under the data folder."""


def new(root: Path) -> Path:
    """Return the place of one request's folder, which nobody has made yet."""
    return root / secrets.token_hex(16)


def make(folder: Path) -> None:
    """Make one request's folder. Raises StorageFailed."""
    try:
        make_folder(folder)
    except OSError as error:
        raise _not_kept(error) from error


def sync(folder: Path) -> None:
    """Return when the names of one request's files are on the disk. Raises StorageFailed."""
    try:
        sync_folder(folder)
    except OSError as error:
        raise _not_kept(error) from error


def _not_kept(error: OSError) -> StorageFailed:
    return StorageFailed(f"The inputs could not be kept: {error.strerror or error}.")


class InputFolders:
    """The folder of folders. Names are the server's own random ones, never a client's."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def remove(self, name: str) -> None:
        """Remove one request's inputs; they may be gone already."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def sweep(self, needed: Collection[str]) -> int:
        """Remove all but the `needed` folders; return how many. To be called before anything is accepted."""
        unneeded = [path for path in self.root.iterdir() if path.name not in needed] if self.root.is_dir() else []
        for path in unneeded:
            if path.is_dir():
                self.remove(path.name)
            else:
                path.unlink(missing_ok=True)
        return len(unneeded)
