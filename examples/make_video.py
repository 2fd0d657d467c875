"""Make a clip, watch how far it is, and write it and a picture of it to files.

python examples/make_video.py "a red circle moves to the right" clip.mp4
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1",
    api_key=os.environ.get("PHOTOGRAM_API_KEY", "not-needed"),
)
prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle moves to the right"
path = Path(sys.argv[2] if len(sys.argv) > 2 else "clip.mp4")

video = client.videos.create(prompt=prompt, seconds="1")
while video.status in ("queued", "in_progress"):
    print(f"{video.status} {video.progress} %")
    time.sleep(0.5)
    video = client.videos.retrieve(video.id)
if video.status == "failed":
    sys.exit(f"{video.error.code}: {video.error.message}")

client.videos.download_content(video.id).write_to_file(path)
client.videos.download_content(video.id, variant="thumbnail").write_to_file(path.with_suffix(".webp"))
print(f"{path}: {video.size}, {video.num_frames} frames, {video.seconds} s, seed {video.seed}")
