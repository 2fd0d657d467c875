"""Says whether a picture shows what its prompt asked for; needs neither a GPU nor the models.

>>> score_image(image, parse_prompt("a red circle on a blue background"))
Verdict(background=True, colour=True, shape=True, position=True, size=True)

Works by nearest palette colour, largest component of that colour, and overlap with each shape's own drawing.
Pictures are judged with their shorter side at 128 pixels. B pictures, H/W height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import vocabulary as words
from .render import PALETTE, pack, render, to_device
from .scenes import Item, Scene, article, clamp_inside, held_out
from .vocabulary import COLOUR_INDEX, COLOURS, SHAPE_INDEX, SHAPES, Zone

JUDGED_SIZE = 128
_MIN_AREA = 0.003
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_SIZE_AREAS = {"small": 0.095, "medium": 0.165, "large": 0.265}  # radius a size word stands for, alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a picture must show: one thing, or two of which the first is `relation` the second."""

    shapes: tuple[int, ...]
    colours: tuple[int, ...]
    background: int
    zone: Zone | None = None
    relation: str | None = None
    size: str | None = None

    @property
    def prompt(self) -> str:
        """The sentence that asks for it."""
        names = []
        for shape, colour in zip(self.shapes, self.colours, strict=True):
            text = f"{COLOURS[colour]} {SHAPES[shape]}"
            if self.size in ("small", "large"):
                text = f"{self.size} {text}"
            names.append(f"{article(text)} {text}")
        ground = f" on {article(COLOURS[self.background])} {COLOURS[self.background]} background"
        if self.relation is not None:
            return f"{names[0]} {self.relation} {names[1]}{ground}"
        where = "" if self.zone is None else " " + words.ZONE_PHRASES[self.zone][0]
        return names[0] + where + ground


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right about a picture."""

    background: bool
    colour: bool
    shape: bool
    position: bool
    size: bool

    @property
    def all(self) -> bool:
        return self.background and self.colour and self.shape and self.position and self.size


def parse_prompt(prompt: str) -> Spec:
    """The spec of a sentence of the form `Spec.prompt` makes.

    Raises ValueError for any other sentence.
    """
    text = prompt.lower().strip().rstrip(".")
    head, found, ground = text.rpartition(" on a")
    colour = ground.removeprefix("n").strip().removesuffix(" background")
    if not found or colour not in COLOUR_INDEX:
        raise ValueError(f"prompt {prompt!r}: no 'on a <colour> background' at its end")
    relation = next((r for r in RELATIONS if f" {r} " in head), None)
    zone = next((z for z, names in words.ZONE_PHRASES.items() if any(head.endswith(" " + n) for n in names)), None)
    parts = head.split(f" {relation} ") if relation else [head]
    shapes, colours, size = [], [], None
    for part in parts:
        tokens = part.split()
        shapes.append(next((SHAPE_INDEX[t] for t in tokens if t in SHAPE_INDEX), -1))
        colours.append(next((COLOUR_INDEX[t] for t in tokens if t in COLOUR_INDEX), -1))
        size = next((t for t in tokens if t in ("small", "large")), size)
    if -1 in shapes or -1 in colours:
        raise ValueError(f"prompt {prompt!r}: every thing needs a colour and a shape, as in 'a red circle'")
    return Spec(shapes=tuple(shapes), colours=tuple(colours), background=COLOUR_INDEX[colour], zone=zone,
                relation=relation, size=size)  # fmt: skip


def benchmark(num: int, seed: int, *, held: bool = False) -> list[Spec]:
    """Random specs, half single and half pairs; with `held`, each has a pair of shape and colour never trained on."""
    rng = Random(seed)
    specs: list[Spec] = []
    while len(specs) < num:
        count = 1 + len(specs) % 2
        shades = rng.sample(range(len(COLOURS)), count + 1)
        shapes = tuple(rng.randrange(len(SHAPES)) for _ in range(count))
        if any(held_out(s, c) for s, c in zip(shapes, shades[1:], strict=True)) != held:
            continue
        zone = rng.choice([*words.ZONE_PHRASES, None]) if count == 1 else None
        relation = rng.choice(list(RELATIONS)) if count == 2 else None
        size = rng.choice([None, "small", "large"]) if count == 1 else None
        specs.append(Spec(shapes=shapes, colours=tuple(shades[1:]), background=shades[0], zone=zone,
                          relation=relation, size=size))  # fmt: skip
    return specs


def ideal_scene(spec: Spec) -> Scene:
    """A scene that shows the spec, drawn as the training scenes are."""
    scene = Scene(colour=spec.background)
    for i, (shape, colour) in enumerate(zip(spec.shapes, spec.colours, strict=True)):
        if spec.relation is not None:
            dx, dy = RELATIONS[spec.relation]
            sign = 0.25 if i == 0 else -0.25
            scene.items.append(Item(shape, colour, 0.5 + dx * sign, 0.5 + dy * sign, 0.16))
        else:
            radius = _SIZE_AREAS[spec.size] if spec.size else 0.19
            x, y = (clamp_inside(words.ZONE_CENTRES[i], radius) for i in (spec.zone or (1, 1)))
            scene.items.append(Item(shape, colour, x, y, radius))
    return scene


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of one aspect, the shorter side 128."""
    scale = JUDGED_SIZE / min(images[0].size)
    size = (round(images[0].width * scale), round(images[0].height * scale))
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def colour_labels(pixels: torch.Tensor) -> torch.Tensor:
    """Nearest palette colour (B, H, W) of each pixel; -1 where none is near, as in a soft shadow."""
    palette = torch.tensor(PALETTE, device=pixels.device).view(1, -1, 3, 1, 1)
    best = torch.full(pixels[:, 0].shape, float("inf"), device=pixels.device)
    label = torch.zeros(pixels[:, 0].shape, dtype=torch.long, device=pixels.device)
    for i in range(palette.shape[1]):
        distance = ((pixels.float() - palette[:, i]) ** 2).sum(1)
        closer = distance < best
        best, label = torch.where(closer, distance, best), torch.where(closer, i, label)
    return torch.where(best < 0.55**2, label, -1)


def border_colour(labels: torch.Tensor) -> torch.Tensor:
    """The most frequent colour (B,) along the picture's edge."""
    edge = torch.cat([labels[:, :4].flatten(1), labels[:, -4:].flatten(1), labels[:, :, :4].flatten(1),
                      labels[:, :, -4:].flatten(1)], 1)  # fmt: skip
    return F.one_hot(edge + 1, len(COLOURS) + 1)[..., 1:].sum(1).argmax(1)


def largest_component(mask: torch.Tensor) -> torch.Tensor:
    """The largest connected part of each mask (B, H, W), details a few pixels wide bridged."""
    B, H, W = mask.shape
    joined = F.max_pool2d(mask.float()[:, None], 7, 1, 3)  # rims, windows and whiskers cut no shape in two
    label = torch.arange(1, H * W + 1, device=mask.device).float().view(1, 1, H, W) * joined
    for i in range(240):
        grown = F.max_pool2d(label, 3, 1, 1) * joined
        if i % 16 == 15 and torch.equal(grown, label):
            break
        label = grown
    flat = (label * mask[:, None]).view(B, -1).long()
    counts = torch.zeros(B, H * W + 1, device=mask.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    counts[:, 0] = 0
    return (flat == counts.argmax(1)[:, None]).view(B, H, W) & mask


@dataclass(slots=True)
class Geometry:
    """Area, centre of the bounding box and its edges (each (B,)), as fractions of the picture."""

    area: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    box: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    radius: torch.Tensor  # half the box's longer side, as a fraction of the picture's shorter side


def geometry(mask: torch.Tensor) -> Geometry:
    _, H, W = mask.shape
    columns, rows = mask.any(1), mask.any(2)
    ix, iy = torch.arange(W, device=mask.device), torch.arange(H, device=mask.device)
    x0 = torch.where(columns, ix, W).min(1).values / W
    x1 = (torch.where(columns, ix, -1).max(1).values + 1) / W
    y0 = torch.where(rows, iy, H).min(1).values / H
    y1 = (torch.where(rows, iy, -1).max(1).values + 1) / H
    radius = torch.maximum((x1 - x0) * W, (y1 - y0) * H) / 2 / min(H, W)
    return Geometry(mask.float().mean((1, 2)), (x0 + x1) / 2, (y0 + y1) / 2, (x0, x1, y0, y1), radius)


def _normalised(mask: torch.Tensor, box: tuple[torch.Tensor, ...], size: int = 44) -> torch.Tensor:
    """Masks cut to their boxes and scaled to one size (B, size, size)."""
    x0, x1, y0, y1 = box
    H, W = mask.shape[-2:]
    half = torch.maximum((x1 - x0) * W, (y1 - y0) * H).clamp_min(1) / 2 * 1.05
    grid = (torch.arange(size, device=mask.device) + 0.5) / size * 2 - 1
    gy, gx = torch.meshgrid(grid, grid, indexing="ij")
    px = ((x0 + x1) / 2).view(-1, 1, 1) + gx * (half / W).view(-1, 1, 1)
    py = ((y0 + y1) / 2).view(-1, 1, 1) + gy * (half / H).view(-1, 1, 1)
    return F.grid_sample(mask.float()[:, None], torch.stack([px, py], -1) * 2 - 1, align_corners=False)[:, 0]


@cache
def _templates(device: torch.device) -> torch.Tensor:
    scenes = [Scene(colour=8, items=[Item(i, 4, 0.5, 0.5, 0.3)]) for i in range(len(SHAPES))]
    mask = largest_component(colour_labels(render(to_device(pack(scenes), device), JUDGED_SIZE, JUDGED_SIZE)) == 4)
    return _normalised(mask, geometry(mask).box)


def classify(mask: torch.Tensor) -> torch.Tensor:
    """The shape (B,) whose drawing overlaps each mask most."""
    cut, templates = _normalised(mask, geometry(mask).box)[:, None], _templates(mask.device)[None]
    overlap = torch.minimum(cut, templates).sum((2, 3)) / torch.maximum(cut, templates).sum((2, 3))
    return overlap.argmax(1)


def score_pixels(pixels: torch.Tensor, specs: Sequence[Spec]) -> list[Verdict]:
    """A verdict for each picture (B, 3, H, W) in [-1, 1]."""
    if min(pixels.shape[-2:]) != JUDGED_SIZE:
        scale = JUDGED_SIZE / min(pixels.shape[-2:])
        size = (round(pixels.shape[-2] * scale), round(pixels.shape[-1] * scale))
        pixels = F.interpolate(pixels.float(), size, mode="area")
    labels = colour_labels(pixels)
    ground = border_colour(labels)
    found: list[tuple[Geometry, torch.Tensor]] = []
    for k in range(2):
        colours = torch.tensor([s.colours[min(k, len(s.colours) - 1)] for s in specs], device=pixels.device)
        mask = largest_component(labels == colours.view(-1, 1, 1))
        found.append((geometry(mask), classify(mask)))
    return [_verdict(i, spec, int(ground[i]), found) for i, spec in enumerate(specs)]


def _verdict(i: int, spec: Spec, ground: int, found: Sequence[tuple[Geometry, torch.Tensor]]) -> Verdict:
    things = [(float(g.area[i]), float(g.x[i]), float(g.y[i]), int(shape[i]), g) for g, shape in found]
    things = things[: len(spec.shapes)]
    seen = all(area > _MIN_AREA for area, *_ in things)
    shape = seen and all(thing[3] == want for thing, want in zip(things, spec.shapes, strict=True))
    position, size = True, True
    _, x, y, _, first = things[0]
    if spec.relation is not None:
        dx, dy = x - things[1][1], y - things[1][2]
        sx, sy = RELATIONS[spec.relation]
        along, across = dx * sx + dy * sy, abs(dx * sy) + abs(dy * sx)
        position = along > 0.12 and along > across
    elif spec.zone is not None:
        radius = _SIZE_AREAS[spec.size] if spec.size else 0.19
        want = [clamp_inside(words.ZONE_CENTRES[j], radius) for j in spec.zone]
        position = abs(x - want[0]) < 0.15 and abs(y - want[1]) < 0.15
    if spec.size is not None:
        extent = float(first.radius[i])
        size = extent < 0.15 if spec.size == "small" else extent > 0.19
    return Verdict(ground == spec.background, seen, shape, seen and position, seen and size)


def score_image(image: Image.Image, spec: Spec) -> Verdict:
    """The verdict on one picture."""
    return score_pixels(to_pixels([image]), [spec])[0]


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures right in each respect, and in all of them."""
    names = ("background", "colour", "shape", "position", "size", "all")
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 4) for name in names}
