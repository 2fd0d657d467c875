"""Random clips: a scene in which one thing moves, and the sentences that ask for it.

Motions run over the whole clip, whatever its number of frames: every quantity is a function of t in [0, 1].
Knows nothing of pixels: that is `video_render`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

import numpy as np

from . import vocabulary as words
from .scenes import (
    Item,
    Scene,
    _gibberish,
    _natural,
    _stand,
    article,
    background_phrase,
    clamp_inside,
    is_trainable,
    overlaps,
    phrase,
    place_in_zone,
    polish,
    random_item,
    random_scenery,
)
from .vocabulary import COLOURS, SHAPES

MAX_TRACKS = 2
_MOTION_WEIGHTS: Final = {
    "right": 1.4, "left": 1.4, "up": 1.2, "down": 1.2, "bounce": 1.3, "rotate": 1.4, "grow": 1.0, "shrink": 1.0,
    "orbit": 1.0, "recolour": 0.9, "vanish": 0.6, "appear": 0.6, "still": 0.6, "idle": 0.8,
}  # fmt: skip
MOTIONS: Final = tuple(_MOTION_WEIGHTS)
# The plain phrase comes first; "recolour" is followed by a colour, "idle" (small hops) is never asked for.
MOTION_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "right": ("moves right", "moves to the right", "moving right", "slides to the right", "moves from left to right",
              "goes right", "travels to the right"),
    "left": ("moves left", "moves to the left", "moving left", "slides to the left", "moves from right to left",
             "goes left", "travels to the left"),
    "up": ("moves up", "rises", "moving up", "moves upwards", "goes up", "floats up"),
    "down": ("moves down", "falls", "moving down", "falls down", "goes down", "sinks"),
    "bounce": ("bounces", "bounces up and down", "bouncing", "is bouncing", "jumps", "jumps up and down", "jumping"),
    "rotate": ("rotates", "spins", "rotating", "spinning", "turns around", "is spinning"),
    "grow": ("grows", "gets bigger", "growing", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "shrinking", "becomes smaller"),
    "orbit": ("moves in a circle", "goes around", "circles around", "goes around in a circle", "flies in circles"),
    "recolour": ("turns", "becomes", "changes color to", "turns"),
    "vanish": ("disappears", "fades away", "fades out", "vanishes"),
    "appear": ("appears", "fades in", "becomes visible"),
    "still": ("stays still", "does not move", "is still", "stands still"),
    "idle": ("",),
}  # fmt: skip
# What some things do by themselves; fish look left in this world.
OWN_MOTIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "car": (("drives", "right"), ("drives along", "right"), ("driving", "right"), ("driving by", "right")),
    "boat": (("sails", "right"), ("sailing", "right"), ("sails by", "right")),
    "fish": (("swims", "left"), ("swimming", "left"), ("swims by", "left")),
    "bird": (("flies", "right"), ("flying", "right"), ("flies up", "up"), ("flies by", "right")),
    "rocket": (("takes off", "up"), ("launches", "up"), ("flies", "up"), ("flying", "up"), ("launching", "up")),
    "cat": (("walks", "right"), ("runs", "right"), ("walking", "right"), ("running", "right"), ("dancing", "bounce")),
    "star": (("falling", "down"), ("falls from the sky", "down")),
    "circle": (("rolls", "right"), ("rolling", "right"), ("dropping", "down")),
    "flower": (("blooms", "grow"), ("blooming", "grow")),
    "moon": (("rising", "up"),),
    "heart": (("beating", "grow"),),
}  # fmt: skip
_RADII: Final = {"": (0.15, 0.21), "small": (0.095, 0.115), "medium": (0.15, 0.175), "large": (0.22, 0.245)}
# Motions that leave a thing where it is, so that a caption may say where.
RESTING_MOTIONS: Final = ("rotate", "recolour", "vanish", "appear", "still", "idle")
_UNTURNED: Final = frozenset({"circle", "ring"})


@dataclass(slots=True)
class Track:
    """One thing through a clip: each curve gives its values at times t."""

    item: Item
    curves: dict[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    second_colour: int | None = None  # the colour it has at the end

    def at(self, name: str, t: np.ndarray) -> np.ndarray:
        """`x`, `y`, `radius`, `angle`, `alpha` or `tint` (0 first colour, 1 second) at times t."""
        if name in self.curves:
            return self.curves[name](t)
        still = {"alpha": 1.0, "tint": 0.0, "angle": self.item.angle}
        value = still[name] if name in still else {"x": self.item.x, "y": self.item.y, "radius": self.item.radius}[name]
        return np.full(t.shape, value)


@dataclass(slots=True)
class Clip:
    """A scene whose first thing moves."""

    scene: Scene
    motion: str
    tracks: list[Track]


def times(num_frames: int) -> np.ndarray:
    return np.linspace(0, 1, num_frames)


def _span(rng: Random, radius: float) -> tuple[float, float]:
    """Start and end of a straight move."""
    low = clamp_inside(0, radius)
    distance = min(rng.uniform(0.38, 0.6), 1 - 2 * low)
    start = rng.uniform(low, 1 - low - distance)
    return start, start + distance


def _fade(t: np.ndarray) -> np.ndarray:
    return np.clip((t - 0.2) / 0.6, 0, 1)


def set_in_motion(rng: Random, item: Item, motion: str, *, backwards: bool = False) -> Track:
    """The thing with the curves of a motion, kept inside the picture; may move its resting place.

    Raises ValueError for an unknown motion.
    """
    track = Track(item)
    curves, radius = track.curves, item.radius
    if motion in ("right", "left"):
        a, b = _span(rng, radius)
        a, b = (a, b) if motion == "right" else (b, a)
        item.x = a
        curves["x"] = lambda t: a + (b - a) * t
    elif motion in ("up", "down"):
        a, b = _span(rng, radius)
        a, b = (a, b) if motion == "down" else (b, a)
        item.y = a
        curves["y"] = lambda t: a + (b - a) * t
    elif motion == "bounce":
        base = clamp_inside(max(item.y, rng.uniform(0.7, 0.95)), radius)
        height = min(rng.uniform(0.34, 0.5), base - clamp_inside(0, radius))
        item.y = base
        curves["y"] = lambda t: base - height * np.abs(np.sin(2 * math.pi * t))
    elif motion == "rotate":
        sign = -1 if backwards else 1
        curves["angle"] = lambda t: sign * math.pi * t
    elif motion in ("grow", "shrink"):
        small, large = rng.uniform(0.075, 0.095), rng.uniform(0.21, 0.26)
        a, b = (small, large) if motion == "grow" else (large, small)
        item.x, item.y = clamp_inside(item.x, large), clamp_inside(item.y, large)
        item.radius = a
        curves["radius"] = lambda t: a + (b - a) * t
    elif motion == "orbit":
        item.radius = min(radius, 0.15)
        reach, phase = rng.uniform(0.21, 0.27), rng.uniform(0, 2 * math.pi)
        curves["x"] = lambda t: 0.5 + reach * np.cos(phase + 2 * math.pi * t)
        curves["y"] = lambda t: 0.5 + reach * np.sin(phase + 2 * math.pi * t)
        item.x, item.y = (float(curves[k](np.zeros(1))[0]) for k in ("x", "y"))
    elif motion == "recolour":
        curves["tint"] = _fade
    elif motion == "vanish":
        curves["alpha"] = lambda t: 1 - _fade(t)
    elif motion == "appear":
        curves["alpha"] = _fade
    elif motion == "idle":
        base = item.y
        curves["y"] = lambda t: base - 0.035 * np.abs(np.sin(2 * math.pi * t))
    elif motion != "still":
        raise ValueError(f"unknown motion {motion!r}")
    return track


def _subject(rng: Random, scene: Scene, motion: str) -> Item:
    item = random_item(rng, scene, "single")
    while motion == "rotate" and SHAPES[item.shape] in _UNTURNED:
        item = random_item(rng, scene, "single")
    far = motion in ("right", "left", "up", "down", "bounce")
    if motion in ("grow", "shrink", "orbit") or (item.size == "large" and far and rng.random() < 0.5):
        item.size = ""
    item.radius = rng.uniform(*_RADII[item.size])
    item.x, item.y = rng.uniform(0.2, 0.8), rng.uniform(0.25, 0.75)
    if rng.random() < 0.5:
        item.x, item.y = rng.uniform(0.46, 0.54), rng.uniform(0.46, 0.54)
    item.x, item.y = clamp_inside(item.x, item.radius), clamp_inside(item.y, item.radius)
    if motion not in ("up", "orbit", "down", "grow", "shrink"):
        _stand(rng, item, scene)
    return item


def _bystander(rng: Random, clip: Clip) -> Item | None:
    """A second thing that stays where the first never comes."""
    t = times(9)
    first = clip.tracks[0]
    xs, ys, radii = (first.at(name, t) for name in ("x", "y", "radius"))
    for _ in range(12):
        other = random_item(rng, clip.scene, "many", size="", avoid=[first.item.colour])
        if other.shape == first.item.shape:
            continue
        zone = rng.choice(list(words.ZONE_PHRASES))
        other.x, other.y = place_in_zone(rng, zone, other.radius)
        _stand(rng, other, clip.scene)
        ghosts = [Item(0, 0, x, y, r) for x, y, r in zip(xs, ys, radii, strict=True)]
        if not overlaps(other, ghosts, 1.1):
            return other
    return None


def _motion_phrase(rng: Random, clip: Clip) -> str:
    item, motion = clip.tracks[0].item, clip.motion
    own = [text for text, kind in OWN_MOTIONS.get(SHAPES[item.shape], ()) if kind == motion]
    if own and rng.random() < 0.35:
        return rng.choice(own)
    phrases = MOTION_PHRASES[motion]
    text = phrases[0] if rng.random() < 0.45 else rng.choice(phrases)
    second = clip.tracks[0].second_colour
    return text if second is None else f"{text} {COLOURS[second]}"


def _short(rng: Random, clip: Clip, motion: str) -> str:
    """What one writes beside a first frame: mostly the motion."""
    item = clip.tracks[0].item
    name = item.name or SHAPES[item.shape]
    kind = rng.random()
    if kind < 0.12:
        return motion
    if kind < 0.24:
        return f"it {motion}"
    if kind < 0.6 or item.texture == 3:
        return f"the {name} {motion}"
    return f"the {COLOURS[item.colour]} {name} {motion}"


def random_clip(rng: Random) -> tuple[Clip, str, str]:
    """A clip, its caption, and a shorter caption for use beside its first frame."""
    scene = random_scenery(rng)
    motion = rng.choices(MOTIONS, list(_MOTION_WEIGHTS.values()))[0]
    item = _subject(rng, scene, motion)
    zone = None
    if scene.place == 0 and motion in RESTING_MOTIONS and rng.random() < 0.5:
        zone = rng.choice(list(words.ZONE_PHRASES))
        item.x, item.y = place_in_zone(rng, zone, item.radius)
    said = rng.random() > 0.12 or motion == "recolour" or not _natural(rng, item, scene)
    backwards = motion == "rotate" and rng.random() < 0.2
    clip = Clip(scene, motion, [set_in_motion(rng, item, motion, backwards=backwards)])
    if motion == "recolour":
        taken = {item.colour} | ({scene.colour} if scene.place == 0 else set())
        clip.tracks[0].second_colour = rng.choice([c for c in range(len(COLOURS)) if c not in taken])
        item.texture = 0
    noun = phrase(rng, item, colour=said)
    motion_text = _motion_phrase(rng, clip) + (" counterclockwise" if backwards else "")
    text = noun + (" " + rng.choice(words.ZONE_PHRASES[zone]) if zone else "")
    text += (" " if motion_text else "") + motion_text
    if rng.random() < 0.22:
        other = _bystander(rng, clip)
        if other is not None:
            text = _with_bystander(rng, text, clip, other)
    scene.items = [track.item for track in clip.tracks]
    short = _short(rng, clip, motion_text) if motion_text else noun
    if rng.random() < 0.3:
        short = short[:1].upper() + short[1:]
    kind = rng.random()
    if kind < 0.06:
        return clip, "", short
    if kind < 0.14:
        core = f"{phrase(rng, item, colour=said, determiner=rng.random() < 0.5)} {motion_text}".rstrip()
        return clip, polish(rng, _gibberish(rng, core) + background_phrase(rng, scene)), short
    caption = text + background_phrase(rng, scene)
    if rng.random() < 0.06:
        caption = "a video of " + caption
    return clip, polish(rng, caption), short


def _with_bystander(rng: Random, text: str, clip: Clip, other: Item) -> str:
    """Put the second thing in the clip; the caption that names it, too."""
    first = clip.tracks[0].item
    if clip.motion in ("idle", "still") and rng.random() < 0.7:
        # Two things side by side with a verb between them: "a cat playing a piano".
        first.x, other.x = 0.5 - rng.uniform(0.2, 0.25), 0.5 + rng.uniform(0.2, 0.25)
        first.radius = min(first.radius, 0.17)
        other.radius = first.radius * rng.uniform(0.85, 1.1)
        other.y = first.y
        clip.tracks = [set_in_motion(rng, first, "idle"), Track(other)]
        clip.motion = "idle"
        return f"{phrase(rng, first)} {rng.choice(words.JOINING_VERBS)} {phrase(rng, other)}"
    clip.tracks.append(Track(other))
    return text + rng.choice((" next to ", " near ", " beside ")) + phrase(rng, other)


def trainable_clip(rng: Random) -> tuple[Clip, str, str]:
    """A random clip without the pairs of shape and colour kept for evaluation."""
    while True:
        clip, caption, short = random_clip(rng)
        second = clip.tracks[0].second_colour
        shown = [Item(clip.tracks[0].item.shape, second)] if second is not None else []
        if is_trainable(Scene(items=[*clip.scene.items, *shown])):
            return clip, caption, short


def plain_caption(item: Item, motion: str, background: int, second: int | None = None) -> tuple[str, str]:
    """The sentence an evaluation asks for, and its short form beside a first frame."""
    noun = f"{COLOURS[item.colour]} {SHAPES[item.shape]}"
    does = MOTION_PHRASES[motion][0] + (f" {COLOURS[second]}" if second is not None else "")
    ground = COLOURS[background]
    caption = f"{article(noun)} {noun} {does} on {article(ground)} {ground} background"
    return caption, f"the {SHAPES[item.shape]} {does}"
