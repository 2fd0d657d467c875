"""How each shape is drawn: signed distance fields of its body, its dark details and its light details.

Distances are in shape units (the body is about one unit from centre to edge), negative inside.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw

from .vocabulary import SHAPES

ATLAS_SIZE = 128
HALF_EXTENT = 1.35  # the atlas covers [-1.35, 1.35] in both directions
_CANVAS = 512
_Point = tuple[float, float]


class _Pen:
    """Draws one binary layer in shape units."""

    def __init__(self) -> None:
        self.image = Image.new("L", (_CANVAS, _CANVAS), 0)
        self._draw = ImageDraw.Draw(self.image)

    def _pixel(self, x: float, y: float) -> _Point:
        return (_CANVAS / 2 * (1 + x / HALF_EXTENT), _CANVAS / 2 * (1 + y / HALF_EXTENT))

    def polygon(self, points: Sequence[_Point], fill: int = 255) -> None:
        self._draw.polygon([self._pixel(*p) for p in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float | None = None, fill: int = 255) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse([self._pixel(x - rx, y - ry), self._pixel(x + rx, y + ry)], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        self._draw.rectangle([self._pixel(x0, y0), self._pixel(x1, y1)], fill=fill)


def _regular(n: int, outer: float, inner: float, y: float = 0.0) -> list[_Point]:
    radii = (outer, inner)
    return [
        (radii[i % 2] * math.sin(math.pi * i / n), y - radii[i % 2] * math.cos(math.pi * i / n)) for i in range(2 * n)
    ]


def _heart() -> list[_Point]:
    points = []
    for t in np.linspace(0, 2 * math.pi, 120):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16.5, -y / 16.5 - 0.1))
    return points


def _house(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.polygon([(-1.0, 0.0), (0.0, -1.0), (1.0, 0.0)])
    body.box(-0.76, -0.02, 0.76, 0.96)
    body.box(0.42, -0.95, 0.66, -0.3)
    dark.box(-0.18, 0.38, 0.2, 0.96)
    light.box(-0.6, 0.22, -0.32, 0.52)
    light.box(0.36, 0.22, 0.62, 0.52)


def _tree(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.polygon([(0, -1.12), (0.58, -0.36), (-0.58, -0.36)])
    body.polygon([(0, -0.72), (0.78, 0.18), (-0.78, 0.18)])
    body.polygon([(0, -0.22), (0.95, 0.72), (-0.95, 0.72)])
    body.box(-0.17, 0.68, 0.17, 1.08)
    dark.box(-0.17, 0.74, 0.17, 1.08)


def _cat(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.ellipse(0, 0.15, 0.96, 0.82)
    body.polygon([(-0.93, 0.1), (-0.86, -1.05), (-0.2, -0.55)])
    body.polygon([(0.93, 0.1), (0.86, -1.05), (0.2, -0.55)])
    light.ellipse(-0.37, 0.02, 0.2, 0.23)
    light.ellipse(0.37, 0.02, 0.2, 0.23)
    dark.ellipse(-0.36, 0.03, 0.1, 0.19)
    dark.ellipse(0.36, 0.03, 0.1, 0.19)
    dark.polygon([(-0.15, 0.36), (0.15, 0.36), (0, 0.54)])
    for side in (-1, 1):
        dark.polygon([(side * 0.3, 0.46), (side * 0.86, 0.34), (side * 0.86, 0.4), (side * 0.3, 0.53)])


def _fish(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.ellipse(-0.15, 0, 0.88, 0.6)
    body.polygon([(0.45, 0), (1.1, -0.62), (0.95, 0), (1.1, 0.62)])
    body.polygon([(-0.3, -0.5), (0.15, -0.92), (0.3, -0.4)])
    light.ellipse(-0.58, -0.13, 0.18)
    dark.ellipse(-0.61, -0.12, 0.1)


def _flower(body: _Pen, dark: _Pen, light: _Pen) -> None:
    for i in range(6):
        body.ellipse(0.62 * math.cos(math.pi * i / 3), 0.62 * math.sin(math.pi * i / 3), 0.44)
    body.ellipse(0, 0, 0.5)
    light.ellipse(0, 0, 0.32)
    dark.ellipse(0, 0, 0.12)


def _car(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.box(-1.1, -0.12, 1.1, 0.42)
    body.polygon([(-0.75, -0.1), (-0.48, -0.66), (0.42, -0.66), (0.76, -0.1)])
    for x in (-0.6, 0.6):
        body.ellipse(x, 0.45, 0.3)
        dark.ellipse(x, 0.45, 0.27)
        light.ellipse(x, 0.45, 0.11)
    light.polygon([(-0.55, -0.14), (-0.38, -0.53), (-0.06, -0.53), (-0.06, -0.14)])
    light.polygon([(0.06, -0.14), (0.06, -0.53), (0.34, -0.53), (0.55, -0.14)])


def _boat(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.polygon([(-1.08, 0.35), (1.08, 0.35), (0.72, 0.95), (-0.72, 0.95)])
    body.box(-0.07, -1.05, 0.07, 0.4)
    body.polygon([(0.0, -1.05), (0.9, 0.2), (0.0, 0.2)])
    body.polygon([(0.0, -0.8), (-0.62, 0.2), (0.0, 0.2)])
    dark.box(-0.06, -1.05, 0.06, 0.34)
    light.polygon([(0.1, -0.8), (0.76, 0.14), (0.1, 0.14)])


def _rocket(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.ellipse(0, -0.15, 0.42, 0.98)
    body.polygon([(-0.3, 0.2), (-0.85, 0.95), (-0.25, 0.75)])
    body.polygon([(0.3, 0.2), (0.85, 0.95), (0.25, 0.75)])
    body.box(-0.24, 0.6, 0.24, 0.98)
    dark.box(-0.24, 0.8, 0.24, 0.98)
    light.ellipse(0, -0.35, 0.2)


def _bird(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.ellipse(-0.05, 0.2, 0.72, 0.56)
    body.ellipse(0.5, -0.4, 0.44)
    body.polygon([(0.82, -0.55), (1.22, -0.34), (0.82, -0.18)])
    body.polygon([(-0.5, 0.1), (-1.2, -0.3), (-1.12, 0.5)])
    body.box(-0.2, 0.7, -0.08, 1.02)
    body.box(0.14, 0.7, 0.26, 1.02)
    dark.polygon([(0.9, -0.52), (1.22, -0.34), (0.9, -0.2)])
    light.ellipse(0.6, -0.46, 0.14)
    dark.ellipse(0.63, -0.45, 0.08)
    dark.polygon([(0.3, 0.05), (-0.6, 0.0), (-0.15, 0.45)])


def _piano(body: _Pen, dark: _Pen, light: _Pen) -> None:
    body.box(-1.0, -0.85, 1.0, 0.3)
    body.box(-1.12, 0.0, 1.12, 0.42)
    for x in (-0.95, 0.75):
        body.box(x, 0.4, x + 0.2, 1.0)
    body.box(-0.6, 0.4, 0.6, 0.72)
    light.box(-0.98, 0.08, 0.98, 0.32)
    for i in range(9):
        dark.box(-0.86 + 0.2 * i, 0.08, -0.76 + 0.2 * i, 0.22)
    dark.box(-0.7, -0.62, 0.7, -0.2)


_PLAIN: dict[str, Callable[[_Pen], None]] = {
    "circle": lambda pen: pen.ellipse(0, 0, 1),
    "square": lambda pen: pen.box(-0.88, -0.88, 0.88, 0.88),
    "triangle": lambda pen: pen.polygon([(0, -1), (1, 0.8), (-1, 0.8)]),
    "star": lambda pen: pen.polygon(_regular(5, 1.08, 0.45, 0.05)),
    "heart": lambda pen: pen.polygon(_heart()),
    "diamond": lambda pen: pen.polygon([(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)]),
    "hexagon": lambda pen: pen.polygon([(math.cos(math.pi * i / 3), math.sin(math.pi * i / 3)) for i in range(6)]),
}
_DETAILED: dict[str, Callable[[_Pen, _Pen, _Pen], None]] = {
    "house": _house, "tree": _tree, "cat": _cat, "fish": _fish, "flower": _flower, "car": _car,
    "boat": _boat, "rocket": _rocket, "bird": _bird, "piano": _piano,
}  # fmt: skip


def _draw(name: str) -> list[Image.Image]:
    pens = [_Pen(), _Pen(), _Pen()]
    body = pens[0]
    if name in _PLAIN:
        _PLAIN[name](body)
    elif name in _DETAILED:
        _DETAILED[name](*pens)
    elif name == "cross":
        body.box(-0.34, -1, 0.34, 1)
        body.box(-1, -0.34, 1, 0.34)
    elif name == "ring":
        body.ellipse(0, 0, 1)
        body.ellipse(0, 0, 0.55, fill=0)
    elif name == "moon":
        body.ellipse(0, 0, 1)
        body.ellipse(0.5, -0.15, 0.82, fill=0)
    else:
        raise ValueError(f"no drawing for shape {name!r}")
    return [pen.image for pen in pens]


def _distance(layer: Image.Image) -> torch.Tensor:
    """Signed distance (ATLAS_SIZE, ATLAS_SIZE) in shape units of one binary layer."""
    inside = np.asarray(layer) > 127
    if not inside.any():
        return torch.ones(ATLAS_SIZE, ATLAS_SIZE)
    edge = (inside != np.roll(inside, 1, 0)) | (inside != np.roll(inside, 1, 1))
    ys, xs = np.nonzero(edge)
    boundary = torch.tensor(np.stack([xs, ys], 1), dtype=torch.float32)
    grid = (torch.arange(ATLAS_SIZE) + 0.5) * _CANVAS / ATLAS_SIZE - 0.5
    gy, gx = torch.meshgrid(grid, grid, indexing="ij")
    queries = torch.stack([gx.flatten(), gy.flatten()], 1)
    nearest = torch.cdist(queries, boundary).min(1).values.view(ATLAS_SIZE, ATLAS_SIZE)
    nearest = nearest * (2 * HALF_EXTENT / _CANVAS)
    sign = torch.tensor(inside)[gy.round().long(), gx.round().long()]
    return torch.where(sign, -nearest, nearest)


@cache
def shape_atlas() -> torch.Tensor:
    """Signed distances (shapes, 3, ATLAS_SIZE, ATLAS_SIZE): body, dark details, light details."""
    return torch.stack([torch.stack([_distance(layer) for layer in _draw(name)]) for name in SHAPES])
