"""Draws clips: the background once, the things in every frame. B clips, T frames, H/W height and width."""

from collections.abc import Sequence

import numpy as np
import torch

from .render import PALETTE, Params, draw_background, draw_things, pack
from .video_scenes import MAX_TRACKS, Clip, times

THINGS = ("shape", "texture", "rgb", "x", "y", "radius", "angle", "alpha")
_OF_FRAMES = ("style", "standing", "horizon")  # what drawing a thing needs to know of its scene


def pack_clips(clips: Sequence[Clip], num_frames: int) -> dict[str, np.ndarray]:
    """Arrays (B, ...) of the scenes and (B, T, MAX_TRACKS, ...) of the things in them."""
    t = times(num_frames)
    out = pack([clip.scene for clip in clips])
    for key in THINGS:
        value = out[key][:, None, :MAX_TRACKS]
        out[key] = np.repeat(value, num_frames, 1)
    for i, clip in enumerate(clips):
        for k, track in enumerate(clip.tracks[:MAX_TRACKS]):
            for key in ("x", "y", "radius", "angle", "alpha"):
                out[key][i, :, k] = track.at(key, t)
            if track.second_colour is not None:
                tint = track.at("tint", t)[:, None]
                first, second = PALETTE[track.item.colour], PALETTE[track.second_colour]
                out["rgb"][i, :, k] = first + (second - first) * tint
    return out


def frames_of(p: Params, frames: slice = slice(None)) -> Params:
    """Packed clips as packed single scenes (B * T, ...), of which the things are in place."""
    things = {key: p[key][:, frames] for key in THINGS}
    num = things["x"].shape[1]
    flat = {key: value.flatten(0, 1) for key, value in things.items()}
    return flat | {key: p[key].repeat_interleave(num, 0) for key in _OF_FRAMES}


def render_clips(p: Params, height: int, width: int) -> torch.Tensor:
    """Clips (B, 3, T, height, width) in [-1, 1]."""
    B, T = p["x"].shape[:2]
    background = draw_background(p, height, width)
    image = background.repeat_interleave(T, 0)
    image = draw_things(frames_of(p), image)
    return image.clamp(-1, 1).view(B, T, 3, height, width).transpose(1, 2)
