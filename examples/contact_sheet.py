"""Draws prompts with the built-in model onto one sheet: `python examples/contact_sheet.py sheet.webp`.

The prompts may follow; without any it draws the 24 below.
"""

import base64
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI
from PIL import Image, ImageDraw

PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a purple background",
    "a green triangle above a white square",
    "a small orange heart in the top left corner",
    "a large blue diamond",
    "a pink flower on a green background",
    "two red circles",
    "three yellow stars",
    "a white moon at night",
    "a red house under a yellow star",
    "a green tree to the left of a red house",
    "a black cat on a yellow background",
    "an orange fish on a blue background",
    "a purple hexagon on a gray background",
    "a blue car below a white moon",
    "a brown cross to the right of a pink ring",
    "a cat on stage",
    "A calico cat playing a piano on stage",
    "a house by day",
    "a tree at night",
    "four green squares",
    "a striped circle",
    "a lighthouse in a storm",
    "something nobody has ever seen",
)
COLUMNS, SIDE, CAPTION = 6, 192, 30


def draw(client: OpenAI, prompt: str, seed: int) -> Image.Image:
    answer = client.images.generate(prompt=prompt, size="256x256", extra_body={"seed": seed})
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def main(path: str, *given: str) -> None:
    prompts = given or PROMPTS
    client = OpenAI(base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1", api_key="not-needed")
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda job: draw(client, job[1], job[0]), enumerate(prompts)))
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + CAPTION)
        sheet.paste(picture.resize((SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS), (x + 3, y + 3))
        words, line, top = prompt.split(), "", y + SIDE - 1
        for word in [*words, ""]:
            if not word or pen.textlength(f"{line} {word}") > SIDE - 8:
                pen.text((x + 4, top), line, fill="black")
                line, top = word, top + 13
            else:
                line = f"{line} {word}".strip()
    sheet.save(path, quality=88)
    print(path)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["contact-sheet.webp"]))
