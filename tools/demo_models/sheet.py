"""Contact sheets: many small pictures in one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL pictures of a batch (B, 3, H, W) in [-1, 1]."""
    array = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in array]


def contact_sheet(images: Sequence[Image.Image], path: Path, columns: int, gap: int = 4) -> None:
    """Write the pictures in rows, each cell as large as the largest picture."""
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (250, 250, 250))
    for i, image in enumerate(images):
        x = gap + (i % columns) * (width + gap) + (width - image.width) // 2
        y = gap + (i // columns) * (height + gap) + (height - image.height) // 2
        sheet.paste(image, (x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)
