"""How much memory a request's work takes beyond the weights, and how much there is for it.

Pure arithmetic, shared by the plan that places weights and by the admission of requests. The estimate counts what must
be held at once and no workspace, so that it is rather too small: the plan adds a margin, admission refuses only what
is certain not to fit.
"""

from __future__ import annotations

from typing import Literal

import msgspec

WorkPhase = Literal["denoise", "decode"]

FRAME_BYTES = 24
"""A finished pixel on the device: three colours in fp32, as decoded and as scaled to bytes."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one call by its size. What is not known is 0, and then nothing is refused for it."""

    token_side: int  # a token stands for a square of this many pixels a side
    frame_multiple: int = 1  # and for this many frames
    bytes_per_token: int = 0
    bytes_per_pixel: int = 0  # of the frames that are decoded at once
    frames_at_once: int | None = None  # None: the whole clip
    pixels_at_once: int | None = None  # of a frame, where it is decoded in tiles
    pixels_together: int = 0  # of several frames, where more than `frames_at_once` are decoded at once while small

    def denoise_bytes(self, width: int, height: int, frames: int | None) -> int:
        """Return what one call of the denoiser takes for one picture or clip of this size (pixels, frames)."""
        latent_frames = 1 + ((frames or 1) - 1) // self.frame_multiple
        return -(-width // self.token_side) * -(-height // self.token_side) * latent_frames * self.bytes_per_token

    def decode_bytes(self, width: int, height: int, frames: int | None) -> int:
        """Return what decoding it takes: the largest of what is decoded at once, and the finished frames."""
        pixels, count = width * height, frames or 1
        at_once = min(pixels, self.pixels_at_once or pixels) * min(count, self.frames_at_once or count)
        at_once = max(at_once, min(pixels * count, self.pixels_together))
        return max(at_once * self.bytes_per_pixel, pixels * count * FRAME_BYTES if self.bytes_per_pixel else 0)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has left for work beside the weights that are there in each phase, in bytes."""

    footprint: Footprint
    denoise_bytes: int
    decode_bytes: int

    def fits(self, width: int, height: int, frames: int | None) -> bool:
        """Say whether a picture or clip of this size (pixels, frames) may fit."""
        return (
            self.footprint.denoise_bytes(width, height, frames) <= self.denoise_bytes
            and self.footprint.decode_bytes(width, height, frames) <= self.decode_bytes
        )
