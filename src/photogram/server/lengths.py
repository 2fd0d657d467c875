"""Lengths of clips: what a request asks for, and what the model draws for it. In frames, and frames a second."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.card import ModelCard
from ..core.errors import RequestError
from .beginnings import Beginning
from .fields import Values

FALLBACK_FPS = 16
"""Of a model whose card names no rate."""


@dataclass(frozen=True, slots=True)
class Length:
    """`drawn` frames are made at `fps` a second; `earlier` ones of the clip that they continue come first, and the
    first that is drawn repeats the last of them."""

    drawn: int
    fps: int
    earlier: int = 0

    @property
    def num_frames(self) -> int:
        """Frames in the file."""
        return self.earlier + self.drawn - 1 if self.earlier else self.drawn

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps


def spoken(seconds: float) -> str:
    """Return a duration as OpenAI's answers have it, a text: ``4``, ``5.06``."""
    return f"{seconds:.2f}".rstrip("0").rstrip(".")


def clip_length(values: Values, card: ModelCard, beginning: Beginning | None, max_frames: int) -> Length:
    """Return the length for a request: `num_frames`, or `seconds` at `fps`, or the model's, as near as it can draw.

    A clip that is drawn anew has its own duration where the request names none, and an extension's length is what it
    adds. Raises RequestError where the fields disagree, and beyond the model's or the server's bound, naming it.
    """
    fps = _rate(values.int("fps"), card, beginning)
    asked = _asked(values, fps)
    if beginning is None or beginning.start == "picture":
        drawn = _legal(card.default_frames or 1 if asked is None else asked, card, fps, max_frames, _param(values))
        return Length(drawn, fps)
    present = max(1, round(beginning.num_frames * fps / beginning.fps))
    if beginning.start == "extend":
        added = (card.default_frames or 2) - 1 if asked is None else asked
        length = Length(_legal(added + 1, card, fps, max_frames, _param(values)), fps, present)
        if length.num_frames > max_frames:
            raise RequestError(
                f"'{beginning.param}': with what is added the clip has {length.num_frames} frames; this server allows "
                f"at most {max_frames} (--max-frames).",
                param=beginning.param,
            )
        return length
    if asked is None:
        return Length(_legal(present, card, fps, max_frames, beginning.param), fps)
    if asked > present:
        raise RequestError(
            f"{_param(values)}: {asked} frames at {fps} a second, but the clip has {present} "
            f"({spoken(present / fps)} s).",
            param=_param(values),
        )
    return Length(_legal(asked, card, fps, max_frames, _param(values)), fps)


def _rate(asked: int | None, card: ModelCard, beginning: Beginning | None) -> int:
    own = beginning is not None and beginning.video_id is not None
    rate = round(beginning.fps) if beginning is not None and own else card.default_fps or FALLBACK_FPS
    if asked is not None and beginning is not None and own and beginning.start == "extend" and asked != rate:
        raise RequestError(f"fps {asked}: an extension has its clip's, {rate}.", param="fps")
    return asked or rate


def _asked(values: Values, fps: int) -> int | None:
    """The frames that a request asks for in one way or the other."""
    seconds, num_frames = values.float("seconds"), values.int("num_frames")
    if seconds is None:
        return num_frames
    frames = max(1, round(seconds * fps))
    # A frame either way is a client's rounding, and the picture that a clip begins with.
    if num_frames is not None and abs(frames - num_frames) > 1:
        raise RequestError(
            f"num_frames {num_frames} disagrees with seconds {spoken(seconds)}, which are {frames} frames at {fps} a "
            "second; send one of them.",
            param="num_frames",
        )
    return frames if num_frames is None else num_frames


def _param(values: Values) -> str:
    return "num_frames" if values.int("num_frames") is not None else "seconds"


def _legal(asked: int, card: ModelCard, fps: int, max_frames: int, param: str) -> int:
    """Return the nearest number of frames that the model can draw; of two, the larger."""
    step = card.frame_multiple
    drawn = 1 + (2 * (asked - 1) + step) // (2 * step) * step
    limit = min(max_frames, card.max_frames or max_frames)
    if drawn > limit:
        whose = f"model '{card.name}' makes" if limit == card.max_frames else "this server allows (--max-frames)"
        hint = "; send seconds to take its beginning" if param not in ("seconds", "num_frames") else ""
        raise RequestError(
            f"{param}: {asked} frames at {fps} a second; {whose} at most {limit} ({spoken(limit / fps)} s){hint}.",
            param=param,
        )
    return drawn
