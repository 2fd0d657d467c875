"""Draws scenes: numbers in, batches of anti-aliased pictures out, on any device.

`pack` turns scenes into tensors (what colour is the sky of a beach at night), `render` turns tensors into
pixels. B pictures, K things in each, H/W height and width; colours are in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .atlas import HALF_EXTENT, shape_atlas
from .scenes import MAX_ITEMS, Scene
from .vocabulary import COLOUR_RGB, PLACES

Params = dict[str, torch.Tensor]
PALETTE = np.array(list(COLOUR_RGB.values()), np.float32) / 127.5 - 1
# Ridge kinds of a horizon, and textures of the ground.
_FLAT, _HILLS, _PEAKS, _SKYLINE, _BAND = range(5)
_SMOOTH, _PLANKS, _WAVES, _MOWN = range(4)
_DAY_SKY = ((108, 178, 245), (205, 232, 250))
# sky top, sky bottom, ground top, ground bottom, ridge colour; horizon, ridge kind, ridge height, ground texture
_PLACE_TABLE: dict[str, tuple[tuple[tuple[int, int, int], ...], tuple[float, int, float, int]]] = {
    "meadow": ((*_DAY_SKY, (128, 205, 98), (72, 152, 62), (98, 178, 88)), (0.6, _HILLS, 0.1, _MOWN)),
    "beach": ((*_DAY_SKY, (247, 226, 176), (226, 196, 138), (52, 142, 204)), (0.64, _BAND, 0.13, _SMOOTH)),
    "snow": (((165, 202, 240), (226, 238, 250), (250, 252, 255), (212, 226, 242), (222, 233, 246)),
             (0.6, _HILLS, 0.12, _SMOOTH)),
    "desert": (((118, 188, 240), (250, 232, 195), (236, 192, 124), (206, 152, 88), (226, 178, 108)),
               (0.6, _HILLS, 0.09, _SMOOTH)),
    "sea": ((*_DAY_SKY, (52, 136, 200), (22, 74, 142), (52, 136, 200)), (0.52, _FLAT, 0.0, _WAVES)),
    "mountains": ((*_DAY_SKY, (112, 172, 92), (80, 132, 72), (124, 134, 164)), (0.62, _PEAKS, 0.3, _SMOOTH)),
    "city": ((*_DAY_SKY, (112, 114, 122), (82, 84, 92), (104, 116, 148)), (0.64, _SKYLINE, 0.36, _SMOOTH)),
    "room": (((244, 230, 206), (228, 208, 180), (188, 134, 88), (152, 102, 62), (188, 134, 88)),
             (0.66, _FLAT, 0.0, _PLANKS)),
    "stage": (((156, 26, 38), (96, 12, 24), (172, 112, 62), (112, 66, 36), (156, 26, 38)),
              (0.68, _FLAT, 0.0, _PLANKS)),
    "space": (((14, 12, 38), (44, 22, 74), (14, 12, 38), (44, 22, 74), (14, 12, 38)), (2.0, _FLAT, 0.0, _SMOOTH)),
}  # fmt: skip
_NIGHT_SKY = np.array(((10, 14, 44), (44, 54, 108)), np.float32)
_SUNSET_SKY = np.array(((92, 70, 150), (255, 152, 84)), np.float32)


def second_tone(rgb: np.ndarray) -> np.ndarray:
    """The colour that patterns and textures alternate with: darker, or lighter for the very dark."""
    dark = rgb.mean(-1, keepdims=True) < -0.5
    return np.where(dark, rgb + 0.35, (rgb + 1) * 0.78 - 1).astype(np.float32)


def _scenery_numbers(scene: Scene) -> dict[str, np.ndarray | float]:
    """The background's numbers for one scene."""
    chance = scene.chance
    if scene.place == 0:
        base = PALETTE[scene.colour]
        lit = 0.0 if scene.style == 1 else 1.0
        top, bottom = base + 0.05 * lit, base - 0.05 * lit
        return {
            "bands": np.stack([top, bottom, top, bottom, top]), "horizon": 2.0, "ridge": 0, "amplitude": 0.0,
            "ground": 0, "stars": 0.0, "disc": 0.0, "disc_x": 0.5, "disc_y": 0.2, "disc_rgb": base, "clouds": 0.0,
            "curtain": 0.0, "pattern": scene.pattern, "second": second_tone(base), "windows": 0.0,
        }  # fmt: skip
    colours, (horizon, ridge, amplitude, ground) = _PLACE_TABLE[PLACES[scene.place]]
    bands = np.array(colours, np.float32)
    name = PLACES[scene.place]
    open_sky = name not in ("room", "stage", "space")
    night, sunset = open_sky and scene.time == 1, open_sky and scene.time == 2
    disc_rgb = np.array((255, 240, 170), np.float32)
    if night:
        bands[:2] = _NIGHT_SKY
        bands[2:] = bands[2:] * np.array((0.32, 0.36, 0.5), np.float32)
        disc_rgb = np.array((240, 240, 225), np.float32)
    elif sunset:
        bands[:2] = _SUNSET_SKY
        bands[2:] = bands[2:] * np.array((0.86, 0.66, 0.66), np.float32)
        disc_rgb = np.array((255, 205, 110), np.float32)
    bands = bands + (np.array(chance[:3], np.float32) - 0.5) * 14
    disc_y = horizon - 0.14 if sunset else 0.1 + 0.12 * chance[4]
    return {
        "bands": bands / 127.5 - 1, "horizon": horizon + 0.06 * (chance[3] - 0.5), "ridge": ridge,
        "amplitude": amplitude * (0.8 + 0.4 * chance[5]), "ground": ground,
        "stars": 1.0 if night or name == "space" else 0.0, "disc": 1.0 if open_sky else 0.0,
        "disc_x": 0.12 + 0.76 * chance[6], "disc_y": disc_y, "disc_rgb": disc_rgb / 127.5 - 1,
        "clouds": 1.0 if open_sky and not night else 0.0, "curtain": 1.0 if name == "stage" else 0.0,
        "pattern": 0, "second": bands[0] * 0, "windows": 1.0 if night else 0.0,
    }  # fmt: skip


def pack(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Arrays (B, ...) that `render` draws, still on the host so that a worker process can make them."""
    B, K = len(scenes), MAX_ITEMS
    sceneries = [_scenery_numbers(scene) for scene in scenes]
    out: dict[str, np.ndarray] = {
        key: np.stack([np.asarray(s[key]) for s in sceneries]).astype(
            np.int64 if isinstance(value, int) else np.float32
        )
        for key, value in sceneries[0].items()
    }
    out["phase"] = np.array([scene.chance[7] for scene in scenes], np.float32) * 6.283
    out["style"] = np.array([scene.style for scene in scenes], np.int64)
    out["standing"] = np.array([0 < scene.place < len(PLACES) - 1 for scene in scenes], np.float32)
    out["shape"] = np.full((B, K), -1, np.int64)
    out["texture"] = np.zeros((B, K), np.int64)
    out["rgb"] = np.zeros((B, K, 3), np.float32)
    for key, value in (("x", 0.5), ("y", 0.5), ("radius", 0.1), ("angle", 0.0), ("alpha", 1.0)):
        out[key] = np.full((B, K), value, np.float32)
    for i, scene in enumerate(scenes):
        for k, item in enumerate(scene.items[:K]):
            out["shape"][i, k], out["texture"][i, k], out["rgb"][i, k] = item.shape, item.texture, PALETTE[item.colour]
            out["x"][i, k], out["y"][i, k], out["radius"][i, k] = item.x, item.y, item.radius
            out["angle"][i, k] = item.angle
    return out


def to_device(arrays: dict[str, np.ndarray], device: torch.device | str) -> Params:
    return {key: torch.as_tensor(value).to(device, non_blocking=True) for key, value in arrays.items()}


@lru_cache(maxsize=64)
def _grid(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres (1, H, W) as fractions of height and of width."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return y.view(1, -1, 1).expand(1, height, width), x.view(1, 1, -1).expand(1, height, width)


@lru_cache(maxsize=4)
def _atlas(device: torch.device) -> torch.Tensor:
    return shape_atlas().to(device)


def _hash(cell: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    return (torch.sin(cell * 12.9898 + phase * 7.13) * 43758.547).remainder(1.0)


def _mix(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return a + (b - a) * t


def _background(p: Params, Y: torch.Tensor, X: torch.Tensor, height: int, width: int) -> torch.Tensor:
    def field(key: str) -> torch.Tensor:
        return p[key].view(-1, 1, 1)

    def band(i: int) -> torch.Tensor:
        return p["bands"][:, i].view(-1, 3, 1, 1)

    horizon = field("horizon")
    image = _mix(band(0), band(1), (Y / horizon.clamp_max(1.0)).clamp(0, 1)[:, None])
    return _mix(image, p["second"].view(-1, 3, 1, 1), _pattern(p["pattern"], Y, X, height, width)[:, None])


def _scenery(p: Params, image: torch.Tensor, Y: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """The picture with what a place has: stars, sun, clouds, curtain, horizon and spotlight."""
    height, width = image.shape[-2:]
    side = min(height, width)

    def field(key: str) -> torch.Tensor:
        return p[key].view(-1, 1, 1)

    phase = field("phase")
    # Stars: one per cell of a coarse grid, brightness and place by hash.
    cells = 13.0
    ax, ay = X * (width / side) * cells, Y * (height / side) * cells
    seed = ax.floor() + 57.0 * ay.floor()
    dx = ax - ax.floor() - 0.2 - 0.6 * _hash(seed, phase)
    dy = ay - ay.floor() - 0.2 - 0.6 * _hash(seed + 3.7, phase)
    size = max(0.055, 0.8 * cells / side)
    star = (1.2 - torch.sqrt(dx * dx + dy * dy) / size).clamp(0, 1) * (_hash(seed + 9.1, phase) > 0.55)
    image = image + star[:, None] * field("stars")[:, None] * 1.3
    # Sun or moon, with a glow.
    ex = (X - field("disc_x")) * (width / side)
    ey = (Y - field("disc_y")) * (height / side)
    r = torch.sqrt(ex * ex + ey * ey)
    disc = ((0.062 - r) * side + 0.5).clamp(0, 1) + 0.3 * torch.exp(-((r / 0.13) ** 2))
    image = _mix(image, p["disc_rgb"].view(-1, 3, 1, 1), (disc.clamp(0, 1) * field("disc"))[:, None])
    cloud = torch.zeros_like(r)
    for i, (cy, w) in enumerate(((0.16, 0.16), (0.27, 0.11))):
        cx = (phase / 6.283 + 0.47 * i + 0.2).remainder(1.0)
        for ox, oy, s in ((0.0, 0.0, 0.5), (-0.5, 0.12, 0.34), (0.5, 0.14, 0.3)):
            qx, qy = (X - cx) * (width / side) - ox * w, (Y - cy) * (height / side) - oy * w
            cloud = torch.maximum(cloud, (1.6 - torch.sqrt(qx * qx + 2.2 * qy * qy) / (s * w) * 1.1).clamp(0, 1))
    image = _mix(image, torch.ones_like(image[:, :, :1, :1]), (cloud * 0.8 * field("clouds"))[:, None])
    folds = 0.82 + 0.18 * torch.sin(X * 50.3 + phase)
    image = torch.where(field("curtain")[:, None] > 0, (image + 1) * folds[:, None] - 1, image)
    image = _horizon(p, image, Y, X, height)
    # A spotlight from above on a stage.
    cone = (1 - ((X - 0.5).abs() - 0.16 - 0.2 * Y).clamp_min(0) * 6).clamp(0, 1)
    glow = torch.tensor([0.5, 0.46, 0.34], device=image.device).view(1, 3, 1, 1)
    return image + (cone * field("curtain"))[:, None] * glow * (0.55 + 0.45 * Y[:, None])


def _pattern(kind: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How much of the second tone (B, H, W) each pixel has, for striped, checkered, dotted and gradient."""
    side, n = min(height, width), 8.0
    x, y = X * (width / side), Y * (height / side)
    stripes = ((((x + y) * n).remainder(1.0) - 0.5).abs() * 2 - 0.5) * side / n * 0.7
    checks = torch.sin(x * math.pi * n) * torch.sin(y * math.pi * n) * side / n * 0.67
    dots = (0.32 - torch.sqrt(((x * n).remainder(1) - 0.5) ** 2 + ((y * n).remainder(1) - 0.5) ** 2)) * side / n
    hard = torch.stack([stripes, checks, dots]).add(0.5).clamp(0, 1)[:, 0]
    layers = torch.cat([torch.zeros_like(Y), hard, Y * 1.6])
    return layers[kind]


def _horizon(p: Params, image: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, height: int) -> torch.Tensor:
    """The picture with its ridge (hills, peaks, skyline, sea) and its ground drawn over the sky."""

    def field(key: str) -> torch.Tensor:
        return p[key].view(-1, 1, 1)

    phase, horizon, kind = field("phase"), field("horizon"), field("ridge")
    hills = 0.5 + 0.3 * torch.sin(X * 6.3 + phase) + 0.2 * torch.sin(X * 13.1 + 2 * phase)
    peaks = torch.maximum(1 - ((X * 2.3 + phase).remainder(1.0) - 0.5).abs() * 2.4,
                          0.75 - ((X * 3.1 + 1.7 * phase).remainder(1.0) - 0.5).abs() * 1.9)  # fmt: skip
    blocks = 0.3 + 0.7 * _hash((X * 11).floor(), phase)
    top = torch.zeros_like(X) + 0 * phase
    for value, line in ((_HILLS, hills), (_PEAKS, peaks), (_SKYLINE, blocks), (_BAND, torch.ones_like(X))):
        top = torch.where(kind == value, line, top)
    ridge_top = horizon - field("amplitude") * top
    ridge_rgb = p["bands"][:, 4].view(-1, 3, 1, 1)
    ridge = _mix(ridge_rgb, ridge_rgb * 0.8 + 0.1, ((Y - ridge_top) / 0.25).clamp(0, 1)[:, None])
    # Lit windows of a city at night.
    lit = (_hash((X * 44).floor() + 31 * (Y * 36).floor(), phase) > 0.7) & ((X * 44).remainder(1.0) > 0.4)
    lit = lit & ((Y * 36).remainder(1.0) > 0.4) & (kind == _SKYLINE)
    gold = torch.tensor([0.9, 0.7, 0.1], device=image.device).view(1, 3, 1, 1)
    ridge = torch.where((lit & (field("windows") > 0))[:, None], gold, ridge)
    image = _mix(image, ridge, ((Y - ridge_top) * height + 0.5).clamp(0, 1)[:, None])
    t = ((Y - horizon) / (1 - horizon).clamp_min(0.05)).clamp(0, 1)
    ground = _mix(p["bands"][:, 2].view(-1, 3, 1, 1), p["bands"][:, 3].view(-1, 3, 1, 1), t[:, None])
    texture = field("ground")
    fan = (X - 0.5) / (t + 0.45)  # lines that meet at a vanishing point above the horizon
    planks = -0.14 * (((fan * 6).remainder(1.0) - 0.5).abs() > 0.47).float()
    waves = 0.16 * (torch.sin(X * 38 * (1.3 - t) + 3 * torch.sin(t * 30) + phase) * torch.sin(t * 34) > 0.55).float()
    mown = 0.035 * torch.sin(fan * 22)
    relief = torch.zeros_like(t)
    for value, field_value in ((_PLANKS, planks), (_WAVES, waves), (_MOWN, mown)):
        relief = torch.where(texture == value, field_value, relief)
    return _mix(image, ground + relief[:, None], ((Y - horizon) * height + 0.5).clamp(0, 1)[:, None])


def _fill(p: Params, k: int, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The body's colour (B, 3, H, W) with its texture, before light."""
    rgb = p["rgb"][:, k].view(-1, 3, 1, 1)
    dark = rgb.mean(1, keepdim=True) < -0.5
    second = torch.where(dark, rgb + 0.4, (rgb + 1) * 0.68 - 1)
    kind = p["texture"][:, k].view(-1, 1, 1)
    stripes = ((torch.sin((u + 0.25 * v) * 11.5) - 0.25) * 4).clamp(0, 1)
    du, dv = (u * 2.4 + 0.5).remainder(1.0) - 0.5, (v * 2.4 + 0.5).remainder(1.0) - 0.5
    dots = ((0.29 - torch.sqrt(du * du + dv * dv)) * 12).clamp(0, 1)
    amount = torch.where(kind == 1, stripes, torch.where(kind == 2, dots, torch.zeros_like(u)))
    fill = _mix(rgb, second, amount[:, None])
    blobs = torch.sin(2.6 * u + 1.1) + torch.sin(3.4 * v - 0.6 + 0.8 * u) + 0.6 * torch.sin(4.1 * (u - v))
    ginger = torch.tensor([0.9, 0.15, -0.7], device=u.device).view(1, 3, 1, 1)
    black = torch.tensor([-0.75, -0.75, -0.7], device=u.device).view(1, 3, 1, 1)
    calico = _mix(rgb, ginger, ((blobs - 0.35) * 8).clamp(0, 1)[:, None])
    calico = _mix(calico, black, ((-0.75 - blobs) * 8).clamp(0, 1)[:, None])
    return torch.where((kind == 3)[:, None], calico, fill)


def _draw_item(p: Params, k: int, image: torch.Tensor, Y: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    side = min(height, width)
    atlas = _atlas(image.device)

    def field(key: str) -> torch.Tensor:
        return p[key][:, k].view(-1, 1, 1)

    shape = p["shape"][:, k]
    present = (shape >= 0).float().view(-1, 1, 1) * field("alpha")
    radius = field("radius").clamp_min(1e-3)
    dx = (X - field("x")) * (width / side) / radius
    dy = (Y - field("y")) * (height / side) / radius
    cos, sin = torch.cos(field("angle")), torch.sin(field("angle"))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    fields = atlas[shape.clamp_min(0)]

    def distances(layers: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where = torch.stack([u, v], -1) / HALF_EXTENT
        sd = F.grid_sample(layers, where, mode="bilinear", padding_mode="border", align_corners=False)
        far = torch.maximum(u.abs(), v.abs()) > HALF_EXTENT * 0.98
        return torch.where(far[:, None], torch.ones_like(sd), sd)

    style = p["style"].view(-1, 1, 1)
    lit = (style != 1).float()
    # A soft shadow: thrown on a plain background, lying on the ground of a scene.
    thrown = (0.5 - distances(fields[:, :1], u - 0.09, v - 0.15)[:, 0] / 0.22).clamp(0, 1) * 0.26
    lying = (1.25 - torch.sqrt((dx / 0.95) ** 2 + ((dy - 1.02) / 0.2) ** 2)).clamp(0, 1) * 0.42
    standing = p["standing"].view(-1, 1, 1)
    low = field("y") + field("radius") * (side / height) > p["horizon"].view(-1, 1, 1)
    lying = lying * low.float()  # what hangs in the sky throws no shadow on it
    shadow = (thrown * (1 - standing) + lying * standing) * lit * present
    image = _mix(image, image * 0 - 0.95, shadow[:, None])
    sd = distances(fields, u, v)
    pixels = radius * side
    body, dark, light = ((0.5 - sd[:, i] * pixels).clamp(0, 1) for i in range(3))
    fill = _fill(p, k, u, v)
    shade = (-0.085 * v - 0.045 * u) * lit
    rim = -0.11 * (1 + sd[:, 0] / 0.12).clamp(0, 1) * lit
    fill = (fill + 1) * (1 + shade + rim)[:, None] - 1 + 0.04 * shade[:, None]
    rgb = p["rgb"][:, k].view(-1, 3, 1, 1)
    deep = rgb.mean(1, keepdim=True) < -0.5
    dark_rgb = torch.where(deep, rgb + 0.75, (rgb + 1) * 0.22 - 1)
    pale = rgb.mean(1, keepdim=True) > 0.8
    light_rgb = torch.where(pale, torch.full_like(rgb, 0.35), rgb * 0.12 + 0.86)
    fill = _mix(fill, light_rgb, light[:, None])
    fill = _mix(fill, dark_rgb, dark[:, None])
    line = ((sd[:, 0] + 0.09) * pixels + 0.5).clamp(0, 1) * (style == 2).float()
    fill = _mix(fill, torch.full_like(rgb, -0.9), line[:, None])
    return _mix(image, fill, (body * present)[:, None])


def draw_background(p: Params, height: int, width: int) -> torch.Tensor:
    """The scenes without their things (B, 3, height, width), not yet clamped."""
    Y, X = _grid(height, width, p["phase"].device)
    image = _background(p, Y, X, height, width)
    # Only the scenes that have scenery or a k-th thing are drawn upon: most have neither.
    _draw_on(image, (p["horizon"] < 1) | (p["stars"] > 0), p, lambda q, part: _scenery(q, part, Y, X))
    return image


def draw_things(p: Params, image: torch.Tensor) -> torch.Tensor:
    """The pictures with the scenes' things drawn on them, first to last; draws in place."""
    Y, X = _grid(*image.shape[-2:], image.device)
    for k in range(p["shape"].shape[1]):
        _draw_on(image, p["shape"][:, k] >= 0, p, lambda q, part, k=k: _draw_item(q, k, part, Y, X))
    return image


def render(p: Params, height: int, width: int) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [-1, 1] of packed scenes."""
    return draw_things(p, draw_background(p, height, width)).clamp(-1, 1)


def _draw_on(
    image: torch.Tensor, chosen_B: torch.Tensor, p: Params, draw: Callable[[Params, torch.Tensor], torch.Tensor]
) -> None:
    """Draw on the chosen pictures of a batch, in place."""
    rows = chosen_B.nonzero().flatten()
    if len(rows):
        image[rows] = draw({key: value[rows] for key, value in p.items()}, image[rows])
