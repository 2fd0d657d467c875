"""Says whether an edited picture is what its instruction asked for; like `score`, without GPU or models.

The edit is right when the background, and every thing's colour, shape, place and size are those of the scene that
should have come out, and nothing of another colour is left.
"""

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image

from .edits import EDIT_KINDS, Edit, random_edit
from .render import pack, render, to_device
from .scenes import Scene
from .score import JUDGED_SIZE, border_colour, classify, colour_labels, geometry, largest_component, to_pixels
from .sheet import to_images
from .vocabulary import COLOURS


def _is_judgeable(scene: Scene) -> bool:
    colours = [item.colour for item in scene.items]
    plain = scene.place == 0 and scene.pattern == 0 and scene.style == 0
    return plain and len({*colours, scene.colour}) == len(colours) + 1 and not any(i.texture for i in scene.items)


def benchmark_edits(num: int, seed: int) -> list[Edit]:
    """Random edits between scenes whose every thing has a colour of its own."""
    rng = Random(seed)
    edits: list[Edit] = []
    while len(edits) < num:
        edit = random_edit(rng)
        if edit.kind != "none" and _is_judgeable(edit.source) and _is_judgeable(edit.target):
            edits.append(edit)
    return edits


def draw_scene(scene: Scene, size: int = 256) -> Image.Image:
    """The scene as training draws it."""
    return to_images(render(to_device(pack([scene]), "cpu"), size, size))[0]


def score_edit(image: Image.Image, edit: Edit, device: torch.device | str = "cpu") -> bool:
    """Whether everything about the edited picture is right; judged on `device`."""
    target = edit.target
    ideal = render(to_device(pack([target]), device), JUDGED_SIZE, JUDGED_SIZE)
    labels, wanted = colour_labels(to_pixels([image]).to(device)), colour_labels(ideal)
    if int(border_colour(labels)[0]) != target.colour:
        return False
    for index, item in enumerate(target.items):
        mask, ideal_mask = (largest_component(one == item.colour) for one in (labels, wanted))
        got, want = geometry(mask), geometry(ideal_mask)
        if float(got.area[0]) < 0.003 or int(classify(mask)[0]) != item.shape:
            return False
        if edit.free and index == len(target.items) - 1:
            continue
        extents = [max(float(b[1] - b[0]), float(b[3] - b[2])) for b in (got.box, want.box)]
        near = abs(float(got.x[0] - want.x[0])) < 0.1 and abs(float(got.y[0] - want.y[0])) < 0.1
        if not near or not 1 / 1.4 < extents[0] / extents[1] < 1.4:
            return False
    return not _strangers(labels, wanted, target)


def _strangers(labels: torch.Tensor, wanted: torch.Tensor, target: Scene) -> bool:
    """Whether a patch of a colour that the scene does not have is left; eyes and wheels may have theirs."""
    expected = {target.colour, *(item.colour for item in target.items)}
    for colour in set(range(len(COLOURS))) - expected:
        got, want = (
            float((-F.max_pool2d(-(one == colour).float()[:, None], 7, 1, 3)).sum()) for one in (labels, wanted)
        )
        if got > 1.5 * want + 10:
            return True
    return False


def summary_by_kind(edits: Sequence[Edit], right: Sequence[bool]) -> dict[str, float]:
    """Share of right edits, of all and of each kind."""
    table = {"all": round(sum(right) / len(right), 4)}
    for kind in EDIT_KINDS:
        of_kind = [ok for edit, ok in zip(edits, right, strict=True) if edit.kind == kind]
        if of_kind:
            table[kind] = round(sum(of_kind) / len(of_kind), 4)
    return table
