"""The built-in model does what an instruction says: on its own pictures, and on uploads of any size and aspect.

Judged as the model's training is: the background, and every thing's colour, shape, size and place, and that nothing
else is there. The model does about four edits of five right, so each is asked for with four seeds.
"""

import base64
import io
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from PIL import Image
from tools.demo_models.edits import Edit
from tools.demo_models.render import pack, render, to_device
from tools.demo_models.scenes import Item, Scene
from tools.demo_models.score import parse_prompt, score_image
from tools.demo_models.score_edits import score_edit
from tools.demo_models.sheet import to_images
from tools.demo_models.vocabulary import COLOUR_INDEX, SHAPE_INDEX

ORIENTATION = 0x0112


def scene(background: str, **things: tuple[float, float]) -> Scene:
    """Things such as ``red_circle`` by the place of their centre, as shares of the picture's width and height."""
    items = []
    for name, (x, y) in things.items():
        colour, shape = name.split("_")
        items.append(Item(SHAPE_INDEX[shape], COLOUR_INDEX[colour], x, y, 0.15))
    return Scene(colour=COLOUR_INDEX[background], items=items)


EDITS = [
    Edit(
        scene("white", red_circle=(0.3, 0.5), green_triangle=(0.72, 0.5)),
        scene("white", yellow_circle=(0.3, 0.5), green_triangle=(0.72, 0.5)),
        "make the circle yellow",
        "recolour",
    ),
    Edit(
        scene("white", blue_square=(0.3, 0.5), yellow_star=(0.72, 0.5)),
        scene("white", yellow_star=(0.72, 0.5)),
        "remove the square",
        "remove",
    ),
    Edit(
        scene("white", orange_star=(0.75, 0.3), green_house=(0.55, 0.75)),
        scene("white", orange_star=(0.2, 0.3), green_house=(0.55, 0.75)),
        "move the star to the left",
        "move",
    ),
]


@dataclass(frozen=True, slots=True)
class Upload:
    """`size` is as people see it; `orientation` is how an EXIF tag says the stored pixels are to be turned."""

    size: tuple[int, int]
    format: str = "PNG"
    orientation: int | None = None

    def of(self, picture: Scene) -> bytes:
        width, height = self.size
        image = to_images(render(to_device(pack([picture]), "cpu"), height, width))[0]
        exif = Image.Exif()
        if self.orientation == 6:  # shown after a quarter turn clockwise
            exif[ORIENTATION] = 6
            image = image.transpose(Image.Transpose.ROTATE_90)
        file = io.BytesIO()
        image.save(file, self.format, exif=exif, **({"quality": 90} if self.format == "JPEG" else {}))
        return file.getvalue()


UPLOADS = {
    "200x200": Upload((200, 200)),
    "400x300": Upload((400, 300)),
    "512x512": Upload((512, 512)),
    "1024x768": Upload((1024, 768)),
    "JPEG on its side": Upload((300, 400), "JPEG", orientation=6),
}


def edited(server, file: bytes, prompt: str, **fields: str) -> list[Image.Image]:
    """Four pictures, of four seeds."""
    answer = httpx.post(
        f"{server.url}/v1/images/edits",
        data={"prompt": prompt, "seed": "1", "n": "4"} | fields,
        files={"image": file},
        timeout=240,
    )
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).convert("RGB") for one in answer.json()["data"]]


@pytest.mark.long
@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.text.replace(" ", "-"))
def test_an_upload_is_edited_as_the_phrase_says(live_server, edit, upload):
    wanted = UPLOADS[upload]
    pictures = edited(live_server, wanted.of(edit.source), edit.text)
    for picture in pictures:
        assert picture.width / picture.height == pytest.approx(wanted.size[0] / wanted.size[1], rel=0.1)
    assert sum(bool(score_edit(picture, edit)) for picture in pictures) >= 2


def test_a_picture_edited_into_a_larger_one_of_another_aspect_is_edited_all_the_same(live_server):
    edit = EDITS[0]
    pictures = edited(live_server, UPLOADS["400x300"].of(edit.source), edit.text, size="512x512")
    assert {picture.size for picture in pictures} == {(512, 512)}
    wanted = parse_prompt("a yellow circle left of a green triangle on a white background")
    assert sum(bool(score_image(picture, wanted).all) for picture in pictures) >= 3


@pytest.mark.parametrize(
    ("drawn", "phrase", "wanted", "gone"),
    [
        (
            "a red circle on a blue background",
            "make the circle yellow",
            "a yellow circle on a blue background",
            (230, 45, 45),
        ),
        (
            "a blue square left of a yellow star on a white background",
            "remove the square",
            "a yellow star on the right on a white background",
            (45, 95, 225),
        ),
        (
            "a yellow star on the right on a purple background",
            "move the star to the left",
            "a yellow star on the left on a purple background",
            None,
        ),
    ],
)
def test_a_picture_of_the_server_s_own_is_edited_as_the_phrase_says(live_server, drawn, phrase, wanted, gone):
    def is_right(picture: Image.Image) -> bool:
        if gone is not None and (np.abs(np.asarray(picture, int) - gone).max(axis=2) < 60).mean() > 0.005:
            return False
        return bool(score_image(picture, parse_prompt(wanted)).all)

    made = live_server.client().images.generate(prompt=drawn, extra_body={"seed": 1}).data[0]
    source = base64.b64decode(made.b64_json)
    assert score_image(Image.open(io.BytesIO(source)), parse_prompt(drawn)).all
    assert not is_right(Image.open(io.BytesIO(source)).convert("RGB"))
    assert sum(map(is_right, edited(live_server, source, phrase))) >= 3
