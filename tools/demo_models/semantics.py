"""What every token of a scene is about: the hint that a training-only head learns to read from the transformer.

Predicting which thing covers a token, where inside the thing the token lies, and the thing's outline there makes
the transformer learn text and shapes several times faster. The head is thrown away.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .atlas import HALF_EXTENT, shape_atlas
from .render import Params
from .vocabulary import SHAPES

NUM_CLASSES = len(SHAPES) + 1  # the last one is background
_CELLS = 4  # the outline is sampled 4 x 4 times per token
NUM_VALUES = 2 + 3 + _CELLS * _CELLS


@torch.no_grad()
def semantic_targets(p: Params, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes (B, S) and values (B, S, NUM_VALUES) for a grid of height x width tokens.

    Values are the token's place in its thing (2), the thing's colour (3), and body distances at its cells (16).
    """
    device = p["x"].device
    B, K = p["shape"].shape
    side = min(height, width)
    gy = (torch.arange(height * _CELLS, device=device) + 0.5) / (height * _CELLS)
    gx = (torch.arange(width * _CELLS, device=device) + 0.5) / (width * _CELLS)
    Y, X = torch.meshgrid(gy, gx, indexing="ij")
    atlas = shape_atlas()[:, :1].to(device)
    classes = torch.full((B, height, width), NUM_CLASSES - 1, device=device)
    place = torch.zeros(B, 5, height, width, device=device)
    outline = torch.full((B, height * _CELLS, width * _CELLS), 0.4, device=device)
    for k in range(K):
        shape = p["shape"][:, k]
        radius = p["radius"][:, k].view(B, 1, 1).clamp_min(1e-3)
        u = (X - p["x"][:, k].view(B, 1, 1)) * (width / side) / radius
        v = (Y - p["y"][:, k].view(B, 1, 1)) * (height / side) / radius
        where = torch.stack([u, v], -1) / HALF_EXTENT
        sd = F.grid_sample(atlas[shape.clamp_min(0)], where, padding_mode="border", align_corners=False)[:, 0]
        present = (shape >= 0).view(B, 1, 1)
        inside = (torch.maximum(u.abs(), v.abs()) < 1.2) & present
        outline = torch.where(inside, sd.clamp(-0.4, 0.4), outline)
        covered = F.max_pool2d(inside.float()[:, None], _CELLS)[:, 0] > 0
        centre = F.avg_pool2d(torch.stack([u, v], 1), _CELLS).clamp(-2, 2)
        rgb = p["rgb"][:, k].view(B, 3, 1, 1).expand(B, 3, height, width)
        place = torch.where(covered[:, None], torch.cat([centre, rgb], 1), place)
        classes = torch.where(covered, shape.view(B, 1, 1), classes)
    cells = F.pixel_unshuffle(outline[:, None] * 2.5, _CELLS)
    values = torch.cat([place, cells], 1).flatten(2).transpose(1, 2)
    return classes.flatten(1), values


class SemanticHead(nn.Module):
    """Reads classes and values from features (B, S, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 256)
        self.out = nn.Linear(256, NUM_CLASSES + NUM_VALUES)

    def loss(self, features: torch.Tensor, classes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = self.out(F.silu(self.hidden(self.norm(features)))).float()
        kind = F.cross_entropy(out[..., :NUM_CLASSES].flatten(0, 1), classes.flatten().long())
        return kind + ((out[..., NUM_CLASSES:] - values) ** 2).mean()
