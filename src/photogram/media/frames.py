"""Taking over the frames and the sound that a worker left in shared memory."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core.errors import GenerationFailed
from ..core.messages import FrameBlock, SoundBlock
from .sound import Sound

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


def take_sound(block: SoundBlock, frames_dir: Path) -> Sound:
    """Return the block's samples and remove its name from the folder, as `take_frames` does with pixels."""
    path = _checked_path(block, frames_dir)
    try:
        num_samples, channels = block.shape
        expected_bytes = 4 * num_samples * channels
        data = path.read_bytes()
    except OSError as error:
        raise GenerationFailed(f"sound at '{path}' cannot be read: {error.strerror}.") from error
    finally:
        _remove(path)
    if channels not in (1, 2) or block.rate < 1 or len(data) != expected_bytes:
        raise GenerationFailed(
            f"sound at '{path}': {len(data)} bytes for shape {block.shape}, 1 or 2 channels, at {block.rate} a second."
        )
    samples = np.frombuffer(data, np.float32).reshape(num_samples, channels)
    return Sound(np.nan_to_num(samples), block.rate)


def discard_frames(block: FrameBlock | SoundBlock, frames_dir: Path) -> None:
    """Remove frames or sound that nobody wants any more; what is already gone is fine."""
    _remove(_checked_path(block, frames_dir))


def _checked_path(block: FrameBlock | SoundBlock, frames_dir: Path) -> Path:
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
