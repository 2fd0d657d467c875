"""Pixels and sound on their way to the host: files in shared memory, one a block, unlinked by the host."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from ..core.messages import FrameBlock, SoundBlock


class FrameStore:
    """Writes frames into the host's private folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def put(self, frames: np.ndarray) -> FrameBlock:
        """Write uint8 frames (F, H, W, C) and return their place. Raises OSError when the folder is full."""
        frame_count, height, width, channels = frames.shape
        return FrameBlock(path=self._write(frames), shape=(frame_count, height, width, channels))

    def put_sound(self, samples: np.ndarray, rate: int) -> SoundBlock:
        """Write float32 samples (samples, channels) and return their place. Raises OSError when the folder is full."""
        sample_count, channels = samples.shape
        return SoundBlock(path=self._write(samples), shape=(sample_count, channels), rate=rate)

    def _write(self, values: np.ndarray) -> str:
        path = self._folder / f"{secrets.token_hex(16)}.frames"
        try:
            with path.open("xb") as file:
                file.write(np.ascontiguousarray(values).data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return str(path)
