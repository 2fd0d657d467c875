"""Folders of pictures and clips that unfinished jobs need: one for each request, named in the rows of its jobs.

A folder is there before the rows that name it and goes after their last end, so a crash between leaves at most a
folder that no row needs: the next start removes it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

INPUTS = "inputs"
"""The folder's name under the data folder."""


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
