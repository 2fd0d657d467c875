"""Pixels and sound on their way to the host: files in shared memory, one a block.

A new file's pages are cleared before they are written, which takes several times what the writing does. So large ones
are used again: the host puts `GIVEN_BACK` on the name of one that it has read, and a worker that takes that off has it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from ..core.messages import GIVEN_BACK, REUSED_BYTES, FrameBlock, SoundBlock
from .arguments import to_frames, to_sound

_SUFFIX = ".frames"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where a job's pixels are, and its sound."""

    frames: FrameBlock
    sound: SoundBlock | None

    def unlink(self) -> None:
        """Take them away again: nobody will."""
        for block in (self.frames, self.sound):
            if block is not None:
                Path(block.path).unlink(missing_ok=True)


class FrameStore:
    """Writes frames into the host's private folder, which other workers may share."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._mapped: dict[Path, mmap.mmap] = {}

    def put_result(self, pipeline: DiffusionPipeline, result: Any) -> Drawn:
        """Write down what a pipeline has returned. Raises GenerationFailed for what is no picture, and OSError."""
        frames = self.put(to_frames(result))
        heard = to_sound(pipeline, result)
        return Drawn(frames, None if heard is None else self.put_sound(*heard))

    def put(self, frames: np.ndarray) -> FrameBlock:
        """Write uint8 frames (F, H, W, C) and return their place. Raises OSError when the folder is full."""
        frame_count, height, width, channels = frames.shape
        path = self._written_again(frames) or self._write(frames)
        return FrameBlock(path=str(path), shape=(frame_count, height, width, channels))

    def put_sound(self, samples: np.ndarray, rate: int) -> SoundBlock:
        """Write float32 samples (samples, channels) and return their place. Raises OSError when the folder is full."""
        sample_count, channels = samples.shape
        return SoundBlock(path=str(self._write(samples)), shape=(sample_count, channels), rate=rate)

    def _write(self, values: np.ndarray) -> Path:
        path = self._folder / f"{secrets.token_hex(16)}{_SUFFIX}"
        try:
            with path.open("xb") as file:
                file.write(np.ascontiguousarray(values).data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _written_again(self, values: np.ndarray) -> Path | None:
        """Write into a file that the host has given back; None where there is none of this size."""
        if values.nbytes < REUSED_BYTES:
            return None
        self._forget_the_gone()
        for given_back in self._given_back(values.nbytes):
            path = given_back.with_suffix("")
            try:
                # Of several workers one succeeds.
                given_back.rename(path)
            except FileNotFoundError:
                continue
            if path not in self._mapped:
                with path.open("r+b") as file:
                    self._mapped[path] = mmap.mmap(file.fileno(), 0)
            place = np.frombuffer(self._mapped[path], values.dtype).reshape(values.shape)
            np.copyto(place, values)
            return path
        return None

    def _given_back(self, num_bytes: int) -> Iterator[Path]:
        for path in self._folder.glob(f"*{_SUFFIX}{GIVEN_BACK}"):
            try:
                if path.stat().st_size == num_bytes:
                    yield path
            except FileNotFoundError:
                continue  # another worker has it

    def _forget_the_gone(self) -> None:
        """Free what the host did not keep."""
        for path in list(self._mapped):
            if not path.exists() and not os.path.exists(f"{path}{GIVEN_BACK}"):
                del self._mapped[path]  # unmapped with the last view of it
