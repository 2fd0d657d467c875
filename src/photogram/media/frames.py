"""Reading the frames and the sound that a worker left in shared memory."""

from __future__ import annotations

import logging
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core.errors import GenerationFailed
from ..core.messages import GIVEN_BACK, REUSED_BYTES, FrameBlock, SoundBlock
from .sound import Sound

# F frames, H/W height and width in pixels, C channels (3 RGB, 4 RGBA)
Frames = npt.NDArray[np.uint8]

# Two clips of 81 frames of 832x480, or one of 1280x720: shared memory that stays taken while nothing is made.
_KEPT_BYTES = 256 << 20

_log = logging.getLogger(__name__)


@contextmanager
def frames_of(block: FrameBlock, frames_dir: Path) -> Iterator[Frames]:
    """Give the block's pixels, read-only, shape (F, H, W, C), until the context ends, and its file up then.

    They are mapped from the shared memory, which then belongs to others: nothing may look at them afterwards. A file
    that is refused is removed, too. Raises GenerationFailed when the block is not what a worker writes: outside the
    engine's folder (then nothing is touched), no plain file, or of another size than its shape tells.
    """
    path = _checked_path(block, frames_dir)
    try:
        frames_FHWC = _map(path, block.shape)
    except BaseException:
        _remove(path)
        raise
    try:
        yield frames_FHWC
    finally:
        _give_up(path, frames_FHWC.nbytes)


def take_sound(block: SoundBlock, frames_dir: Path) -> Sound:
    """Return the block's samples and remove its name from the folder. Raises as `frames_of`."""
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
    is_inside = path.parent == frames_dir or path.parent.resolve() == frames_dir.resolve()
    if path.name in ("", "..") or not is_inside:
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
    try:
        status = os.fstat(descriptor)
        # A mapping longer than its file kills the process on access, so the size is checked on the open file.
        if not stat.S_ISREG(status.st_mode) or status.st_size != expected_bytes:
            raise GenerationFailed(
                f"frames at '{path}': {status.st_size} bytes, but shape {shape} needs a file of {expected_bytes}."
            )
        mapped = mmap.mmap(descriptor, expected_bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise GenerationFailed(f"frames at '{path}' cannot be mapped: {error}.") from error
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8).reshape(shape)


def _give_up(path: Path, num_bytes: int) -> None:
    """Leave a large file for the next frames of its size, as long as all that lie there are not too much."""
    if num_bytes >= REUSED_BYTES:
        kept_bytes = sum(_size(given_back) for given_back in path.parent.glob(f"*{GIVEN_BACK}"))
        if kept_bytes + num_bytes <= _KEPT_BYTES:
            try:
                path.rename(f"{path}{GIVEN_BACK}")
                return
            except OSError as error:
                _log.warning("frames file %s could not be given back: %s", path, error)
    _remove(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # in use again
        return 0


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("frames file %s could not be removed: %s", path, error)
