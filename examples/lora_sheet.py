"""Draws two LoRAs at rising strengths, and mixed: `python examples/lora_sheet.py pastel sketch sheet.webp`.

Prompts may follow; without any it draws the three below.
"""

import base64
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI
from PIL import Image, ImageDraw

PROMPTS = (
    "a red house under a yellow star",
    "a green tree to the left of a red house",
    "a blue car below a white moon",
)
STRENGTHS = (0.0, 0.3, 0.6, 1.0)
MIXES = ((0.3, 0.7), (0.5, 0.5), (0.7, 0.3))
SIDE, CAPTION = 144, 18


def draw(client: OpenAI, prompt: str, seed: int, loras: list[dict[str, object]]) -> Image.Image:
    answer = client.images.generate(prompt=prompt, size="256x256", extra_body={"seed": seed, "loras": loras})
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def main(first: str, second: str, path: str, *given: str) -> None:
    prompts = given or PROMPTS
    client = OpenAI(base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1", api_key="not-needed")
    columns = [(f"{name} {s}", [{"nickname": name, "strength": s}]) for name in (first, second) for s in STRENGTHS]
    for one, two in MIXES:
        mix = [{"nickname": first, "strength": one}, {"nickname": second, "strength": two}]
        columns.append((f"{one} + {two}", mix))
    cells = [(row, column) for row in range(len(prompts)) for column in range(len(columns))]
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda cell: draw(client, prompts[cell[0]], cell[0], columns[cell[1]][1]), cells))
    sheet = Image.new("RGB", (len(columns) * SIDE, CAPTION + len(prompts) * SIDE), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (caption, _) in enumerate(columns):
        pen.text((column * SIDE + 4, 3), caption, fill="black")
    for (row, column), picture in zip(cells, pictures, strict=True):
        small = picture.resize((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * SIDE + 2, CAPTION + row * SIDE))
    sheet.save(path, quality=85)
    print(path)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ("pastel", "sketch", "lora-sheet.webp")))
