"""What the page on clips says that each family can do, beside the cards of its loaded pipelines."""

import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from diffusers import DiffusionPipeline
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from photogram.core.card import ModelCard
from photogram.core.errors import RequestError
from photogram.server.beginnings import Start, clip_task

from .drawing import Studio

PAGE = Path(__file__).parents[2] / "docs/videos.md"
COLUMNS: tuple[Start | None, ...] = (None, "picture", "redraw", "extend")


def siglip() -> dict[str, object]:
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    size = {"height": 16, "width": 16}
    return {"image_encoder": SiglipVisionModel(config), "feature_extractor": SiglipImageProcessor(size=size)}


# The page's name of each checkpoint that is published under a class of its own -> the tiny family with the same
# networks, that class, and what it has more.
OTHER_CLASSES: dict[str, tuple[str, str, Callable[[], dict[str, object]]]] = {
    "Wan 2.2 I2V-A14B": ("wan-2.2", "WanImageToVideoPipeline", lambda: {"boundary_ratio": 0.9}),
    "HunyuanVideo 1.5 I2V": ("hunyuan-video-1.5", "HunyuanVideo15ImageToVideoPipeline", siglip),
    "CogVideoX I2V": ("cogvideox", "CogVideoXImageToVideoPipeline", dict),
}
SAME_CLASS = {
    "Wan 2.1 T2V": "wan-2.1",
    "Wan 2.1 I2V": "wan-2.1-i2v",
    "Wan 2.2 TI2V-5B": "wan-2.2-ti2v",
    "Wan 2.2 T2V-A14B": "wan-2.2",
    "HunyuanVideo 1.5 T2V": "hunyuan-video-1.5",
    "LTX": "ltx",
    "LTX-2": "ltx-2",
    "CogVideoX T2V": "cogvideox",
}
BUILT_IN = "`demo-video`"


def rows_of_the_page() -> dict[str, tuple[str, ...]]:
    table = PAGE.read_text().partition("| model | text | first frame |")[2].partition("\n\n")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines()[2:]]
    return {name: tuple(cells) for name, *cells in rows}


def cells_of(card: ModelCard) -> tuple[str, ...]:
    """The row that a card is worth, by the very check that lets a request in or refuses it."""

    def can(start: Start | None) -> bool:
        try:
            clip_task(card, start, "any")
        except RequestError:
            return False
        return True

    told = {True: "yes", False: "no"}
    cells = [told[can(start)] for start in COLUMNS]
    if not can(None):
        cells[1] = "always"
    return tuple(cells)


@pytest.mark.parametrize("name", [*SAME_CLASS, *OTHER_CLASSES, BUILT_IN])
def test_page_says_what_the_card_of_a_family_says(name, family_folder, tmp_path):
    if name == BUILT_IN:
        folder = Path("demo-video")
    elif name in SAME_CLASS:
        folder = family_folder(SAME_CLASS[name])
    else:
        family, pipeline_class, more = OTHER_CLASSES[name]
        loaded = DiffusionPipeline.from_pretrained(family_folder(family))
        folder = tmp_path / "other-class"
        getattr(diffusers, pipeline_class)(**loaded.components, **more()).save_pretrained(folder)
    assert rows_of_the_page()[name] == cells_of(Studio(folder, tmp_path).card)


def test_page_has_a_row_for_every_family_that_is_checked():
    assert rows_of_the_page().keys() == {*SAME_CLASS, *OTHER_CLASSES, BUILT_IN}
