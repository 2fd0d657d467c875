"""Begin a clip with a picture, draw it anew with another prompt, and let it go on: one file for each.

python examples/continue_video.py picture.png clips
"""

import os
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1",
    api_key=os.environ.get("PHOTOGRAM_API_KEY", "not-needed"),
)
picture = Path(sys.argv[1])
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "clips")
folder.mkdir(parents=True, exist_ok=True)


def keep(video, name):
    """Wait for a clip and write its file."""
    video = client.videos.poll(video.id)
    if video.status == "failed":
        sys.exit(f"{name}: {video.error.code}: {video.error.message}")
    client.videos.download_content(video.id).write_to_file(folder / name)
    print(f"{folder / name}: {video.num_frames} frames, {video.seconds} s")
    return video


first = keep(client.videos.create(prompt="it moves to the right", seconds="1", input_reference=picture), "first.mp4")
keep(client.videos.remix(first.id, prompt="it moves to the left", extra_body={"strength": 0.8}), "remix.mp4")
keep(client.videos.extend(prompt="it moves on", seconds="1", video=folder / "first.mp4"), "longer.mp4")
