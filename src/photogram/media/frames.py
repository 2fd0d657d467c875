"""Taking over the frames that a worker left in shared memory."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core.errors import GenerationFailed
from ..core.messages import FrameBlock

# F frames, H/W height and width in pixels, C channels (3 RGB, 4 RGBA)
Frames = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)


def take_frames(block: FrameBlock, frames_dir: Path) -> Frames:
    """Return the block's pixels, read-only, shape (F, H, W, C), and remove its name from the folder.

    The array maps the shared memory, which is freed when the last view of it is gone. The file is removed also when
    it is refused. Raises GenerationFailed when the block is not what a worker writes: outside the engine's folder
    (then nothing is touched), no plain file, or of another size than its shape tells.
    """
    path = _checked_path(block, frames_dir)
    try:
        frames_FHWC = _map(path, block.shape)
    finally:
        _remove(path)
    return frames_FHWC


def discard_frames(block: FrameBlock, frames_dir: Path) -> None:
    """Remove frames that nobody wants any more; one that is already gone is fine."""
    _remove(_checked_path(block, frames_dir))


def _checked_path(block: FrameBlock, frames_dir: Path) -> Path:
    path = Path(block.path)
    # The folder is resolved, the name is not: a link in it must not lead out (it is refused when it is opened).
    if path.name in ("", "..") or path.parent.resolve() != frames_dir.resolve():
        raise GenerationFailed(f"frames at '{block.path}': not directly inside the engine's folder '{frames_dir}'.")
    return path


def _map(path: Path, shape: tuple[int, int, int, int]) -> Frames:
    num_frames, height, width, channels = shape
    if min(num_frames, height, width) < 1 or channels not in (3, 4):
        raise GenerationFailed(f"frames of shape {shape}: expected (F, H, W, C) of at least 1 with C 3 or 4.")
    expected_bytes = num_frames * height * width * channels
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise GenerationFailed(f"frames at '{path}' cannot be read: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        # A mapping longer than its file kills the process on access, so the size is checked on the open file.
        if not stat.S_ISREG(status.st_mode) or status.st_size != expected_bytes:
            raise GenerationFailed(
                f"frames at '{path}': {status.st_size} bytes, but shape {shape} needs a file of {expected_bytes}."
            )
        return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("frames file %s could not be removed: %s", path, error)
