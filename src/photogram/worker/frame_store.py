"""Pixels on their way to the host: files in shared memory, one a block, unlinked by the host."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from ..core.messages import FrameBlock


class FrameStore:
    """Writes frames into the host's private folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def put(self, frames: np.ndarray) -> FrameBlock:
        """Write uint8 frames (F, H, W, C) and return their place. Raises OSError when the folder is full."""
        path = self._folder / f"{secrets.token_hex(16)}.frames"
        try:
            with path.open("xb") as file:
                file.write(np.ascontiguousarray(frames).data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        frame_count, height, width, channels = frames.shape
        return FrameBlock(path=str(path), shape=(frame_count, height, width, channels))
