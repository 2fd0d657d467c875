"""Makes a clip in each of the API's ways and lays their frames in rows: `python examples/clip_sheet.py sheet.webp`."""

import io
import os
import sys

import av
from openai import OpenAI
from PIL import Image, ImageDraw

COLUMNS, WIDTH, HEIGHT, CAPTION, GAP = 8, 144, 81, 20, 3


def first_frame() -> bytes:
    """Return a picture to begin with: a red circle on the left."""
    picture = Image.new("RGB", (256, 144), (240, 240, 240))
    ImageDraw.Draw(picture).ellipse((40, 44, 96, 100), fill=(220, 40, 40))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def row(data: bytes, caption: str) -> Image.Image:
    """Return frames of a clip from its first to its last, side by side under a caption."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    strip = Image.new("RGB", (COLUMNS * WIDTH, CAPTION + HEIGHT), "white")
    ImageDraw.Draw(strip).text((GAP, 4), f"{caption} ({len(frames)} frames)", fill="black")
    for column in range(COLUMNS):
        frame = frames[round(column * (len(frames) - 1) / (COLUMNS - 1))]
        frame.thumbnail((WIDTH - GAP, HEIGHT - GAP), Image.Resampling.LANCZOS)
        strip.paste(frame, (column * WIDTH, CAPTION))
    return strip


def main(path: str) -> None:
    client = OpenAI(base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1", api_key="not-needed")
    rows = []

    def keep(video, caption):
        """Wait for a clip, add its row, and return its id and its file."""
        video = client.videos.poll(video.id)
        if video.status == "failed":
            sys.exit(f"{caption}: {video.error.code}: {video.error.message}")
        data = client.videos.download_content(video.id).read()
        rows.append(row(data, caption))
        return video.id, data

    prompt = "a red circle moves to the right"
    keep(client.videos.create(prompt=prompt, extra_body={"seed": 1}), f"from text: {prompt}")
    prompt = "the circle moves to the right"
    picture = ("first.png", first_frame(), "image/png")
    begun = client.videos.create(prompt=prompt, input_reference=picture, extra_body={"seed": 1})
    video_id, data = keep(begun, f"from a first frame: {prompt}")
    prompt = "a blue circle moves to the right"
    settings = {"seed": 2, "strength": 0.9}
    keep(client.videos.remix(video_id, prompt=prompt, extra_body=settings), f"its remix, strength 0.9: {prompt}")
    prompt = "a green square moves to the right"
    edited = client.videos.edit(prompt=prompt, video=("clip.mp4", data), extra_body=settings)
    keep(edited, f"an edit of its file, strength 0.9: {prompt}")
    prompt = "the circle moves down"
    extended = client.videos.extend(prompt=prompt, seconds="2", video=("clip.mp4", data), extra_body={"seed": 4})
    keep(extended, f"its extension: {prompt}")

    sheet = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height), "white")
    for number, strip in enumerate(rows):
        sheet.paste(strip, (0, number * strip.height))
    sheet.save(path, quality=85)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "clip-sheet.webp")
