"""Says whether a clip shows what its prompt asked for; needs neither a GPU nor the models.

Follows the largest patch of the asked colour through the frames. B clips, T frames, H/W height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import vocabulary as words
from .render import to_device
from .scenes import Item, Scene, clamp_inside, held_out
from .score import JUDGED_SIZE, border_colour, classify, colour_labels, geometry, largest_component
from .video_render import pack_clips, render_clips
from .video_scenes import RESTING_MOTIONS, Clip, plain_caption, set_in_motion
from .vocabulary import COLOURS, SHAPES, Zone

_MIN_AREA = 0.003
_RADIUS = 0.18
SCORED_MOTIONS = (
    "right", "left", "up", "down", "bounce", "rotate", "grow", "shrink", "orbit", "recolour", "vanish", "appear",
    "still",
)  # fmt: skip
# A turn shows on none of these, or hardly.
_ROUND = frozenset({"circle", "ring", "hexagon", "flower"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSpec:
    """What a clip must show: one thing on a plain background, and how it moves."""

    shape: int
    colour: int
    background: int
    motion: str
    second_colour: int | None = None
    zone: Zone | None = None

    @property
    def prompt(self) -> str:
        return self._texts()[0]

    @property
    def short_prompt(self) -> str:
        """What is asked beside a first frame."""
        return self._texts()[1]

    def _texts(self) -> tuple[str, str]:
        caption, short = plain_caption(Item(self.shape, self.colour), self.motion, self.background, self.second_colour)
        if self.zone is None:
            return caption, short
        name = f"{COLOURS[self.colour]} {SHAPES[self.shape]}"
        return caption.replace(name, f"{name} {words.ZONE_PHRASES[self.zone][0]}", 1), short


@dataclass(frozen=True, slots=True)
class ClipVerdict:
    """What is right about a clip."""

    background: bool
    colour: bool
    shape: bool
    position: bool
    motion: bool

    @property
    def all(self) -> bool:
        return self.background and self.colour and self.shape and self.position and self.motion


def benchmark(num: int, seed: int, *, held: bool = False, motions: Sequence[str] = SCORED_MOTIONS) -> list[ClipSpec]:
    """Specs of evenly mixed motions; with `held`, of pairs of shape and colour never trained on."""
    rng, specs = Random(seed), []
    while len(specs) < num:
        motion = motions[len(specs) % len(motions)]
        shape, colour = rng.randrange(len(SHAPES)), rng.randrange(len(COLOURS))
        if (motion == "rotate" and SHAPES[shape] in _ROUND) or held_out(shape, colour) != held:
            continue
        background, second = rng.sample([c for c in range(len(COLOURS)) if c != colour], 2)
        zone = rng.choice(list(words.ZONE_PHRASES)) if motion in RESTING_MOTIONS and rng.random() < 0.5 else None
        specs.append(ClipSpec(shape=shape, colour=colour, background=background, motion=motion, zone=zone,
                              second_colour=second if motion == "recolour" else None))  # fmt: skip
    return specs


def ideal_clip(spec: ClipSpec, seed: int = 0) -> Clip:
    """A clip that shows the spec, drawn as the training clips are."""
    item = Item(spec.shape, spec.colour, radius=_RADIUS)
    item.x, item.y = (clamp_inside(words.ZONE_CENTRES[i], _RADIUS) for i in (spec.zone or (1, 1)))
    track = set_in_motion(Random(seed), item, spec.motion)
    track.second_colour = spec.second_colour
    return Clip(Scene(colour=spec.background, items=[item]), spec.motion, [track])


def draw_ideal(specs: Sequence[ClipSpec], num_frames: int, height: int, width: int) -> torch.Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] that show the specs."""
    clips = [ideal_clip(spec, seed) for seed, spec in enumerate(specs)]
    return render_clips(to_device(pack_clips(clips, num_frames), "cpu"), height, width)


def frames_to_pixels(frames: Sequence[Image.Image]) -> torch.Tensor:
    """One clip (1, 3, T, H, W) in [-1, 1] of its frames."""
    arrays = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return (torch.from_numpy(arrays).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


@dataclass(slots=True)
class _Path:
    """The followed patch through time: (T,) arrays, positions as fractions, and its masks (T, H, W)."""

    area: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    masks: torch.Tensor
    aspect: tuple[float, float]  # width and height in units of the shorter side

    def moved(self, i: int, j: int) -> tuple[float, float]:
        return float(self.x[j] - self.x[i]), float(self.y[j] - self.y[i])

    @property
    def rests(self) -> bool:
        return float(np.ptp(self.x)) < 0.13 and float(np.ptp(self.y)) < 0.13


def _follow(labels: torch.Tensor, colour: int) -> _Path:
    masks = largest_component(labels == colour)
    g = geometry(masks)
    H, W = masks.shape[-2:]
    side = min(H, W)
    return _Path(*(v.cpu().numpy() for v in (g.area, g.x, g.y, g.radius)), masks, (W / side, H / side))


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp_min(1))


def _cut(mask: torch.Tensor, half: float, degrees: float = 0.0, size: int = 48) -> torch.Tensor:
    """The mask around its centre of mass, turned clockwise (size, size)."""
    H, W = mask.shape
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if len(ys) == 0:
        return torch.zeros(size, size)
    cy, cx = float(ys.float().mean()) + 0.5, float(xs.float().mean()) + 0.5
    grid = ((torch.arange(size) + 0.5) / size * 2 - 1) * half
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    a = math.radians(degrees)
    px = cx + math.cos(a) * u + math.sin(a) * v
    py = cy + math.cos(a) * v - math.sin(a) * u
    where = torch.stack([px / W * 2 - 1, py / H * 2 - 1], -1)[None]
    return F.grid_sample(mask.float().cpu()[None, None], where, align_corners=False)[0, 0]


def _turns(path: _Path) -> bool:
    """Whether a quarter of the way through the thing has turned clockwise by about 45 degrees."""
    quarter = len(path.x) // 4
    half = float(path.radius[0]) * min(path.masks.shape[-2:]) * 1.5
    later = _cut(path.masks[quarter], half)

    def fit(degrees: float) -> float:
        turned = _cut(path.masks[0], half, degrees)
        return float(torch.minimum(turned, later).sum() / torch.maximum(turned, later).sum().clamp_min(1))

    fits = {degrees: fit(degrees) for degrees in range(-165, 181, 15)}
    wanted = max(fits[d] for d in (30, 45, 60))
    return path.rests and wanted >= max(fits.values()) - 0.06 and wanted > fits[0] + 0.03


def _moves(motion: str, path: _Path, second: _Path | None) -> bool:
    """Whether a path is that of a motion."""
    last, middle = len(path.x) - 1, len(path.x) // 2
    area, seen = path.area, path.area > _MIN_AREA * 0.5
    if motion == "vanish":
        return bool(area[0] > _MIN_AREA and area[last] < 0.04 * area[0])
    if motion == "appear":
        return bool(area[last] > _MIN_AREA and area[0] < 0.04 * area[last])
    if motion == "recolour":
        assert second is not None
        same = _overlap(path.masks[0], second.masks[last])
        return bool(area[0] > _MIN_AREA and area[last] < 0.3 * area[0] and same > 0.6)
    if not seen.all():
        return False
    dx, dy = path.moved(0, last)
    if motion in ("right", "left"):
        along = dx if motion == "right" else -dx
        return along > 0.2 and abs(dy) < 0.5 * along
    if motion in ("up", "down"):
        along = dy if motion == "down" else -dy
        return along > 0.2 and abs(dx) < 0.5 * along
    if motion in ("grow", "shrink"):
        ratio = path.radius[last] / path.radius[0]
        return bool((ratio > 1.6 if motion == "grow" else ratio < 1 / 1.6) and path.rests)
    if motion == "bounce":
        rise, back = path.moved(0, last // 4)[1], path.moved(0, middle)[1]
        return bool(rise < -0.15 and abs(back) < 0.13 and abs(dy) < 0.13 and np.ptp(path.x) < 0.13)
    if motion == "orbit":
        wide = np.ptp(path.x) > 0.25 and np.ptp(path.y) > 0.25
        return bool(wide and abs(dx) < 0.15 and abs(dy) < 0.15)
    if motion == "rotate":
        return _turns(path)
    if motion == "still":
        steady = min(_overlap(path.masks[0], path.masks[i]) for i in (last // 4, middle, last))
        return path.rests and steady > 0.75
    raise ValueError(f"motion {motion!r} is not scored")


def score_clips(clips: torch.Tensor, specs: Sequence[ClipSpec]) -> list[ClipVerdict]:
    """A verdict for each clip (B, 3, T, H, W) in [-1, 1]."""
    B, _, T, H, W = clips.shape
    scale = 1.0 if JUDGED_SIZE <= min(H, W) <= 1.25 * JUDGED_SIZE else JUDGED_SIZE / min(H, W)
    frames = clips.float().transpose(1, 2).flatten(0, 1)
    if scale != 1:
        size = (round(H * scale), round(W * scale))
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    labels = colour_labels(frames)
    ground = border_colour(labels).view(B, T)
    labels = labels.view(B, T, *labels.shape[1:])
    verdicts = []
    for i, spec in enumerate(specs):
        path = _follow(labels[i], spec.colour)
        second = None if spec.second_colour is None else _follow(labels[i], spec.second_colour)
        first = T - 1 if spec.motion in ("appear", "grow") else 0
        seen = bool(path.area[first] > _MIN_AREA)
        shape = seen and int(classify(path.masks[first : first + 1])[0]) == spec.shape
        position = True
        if spec.zone is not None:
            want = [clamp_inside(words.ZONE_CENTRES[j], _RADIUS) for j in spec.zone]
            position = abs(float(path.x[first]) - want[0]) < 0.15 and abs(float(path.y[first]) - want[1]) < 0.15
        background = float((ground[i] == spec.background).float().mean()) > 0.9
        motion = seen and _moves(spec.motion, path, second)
        if spec.motion in ("vanish", "appear"):  # where the thing is not, there is background and nothing else
            left = labels[i, T - 1 - first][path.masks[first]] == spec.background
            motion = motion and float(left.float().mean()) > 0.9
        verdicts.append(ClipVerdict(background, seen, shape, seen and position, motion))
    return verdicts


def summary(verdicts: Sequence[ClipVerdict]) -> dict[str, float]:
    """Share of clips right in each respect, and in all of them."""
    names = ("background", "colour", "shape", "position", "motion", "all")
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 4) for name in names}


def by_motion(specs: Sequence[ClipSpec], verdicts: Sequence[ClipVerdict]) -> dict[str, float]:
    """Share of clips whose motion is right, for each motion."""
    found: dict[str, list[bool]] = {}
    for spec, verdict in zip(specs, verdicts, strict=True):
        found.setdefault(spec.motion, []).append(verdict.motion)
    return {motion: round(sum(right) / len(right), 2) for motion, right in found.items()}
