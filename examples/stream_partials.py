"""Watch a picture come about: the estimates on the way arrive as events, then the finished picture.

python examples/stream_partials.py "a yellow star on a blue background" frames
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1",
    api_key=os.environ.get("PHOTOGRAM_API_KEY", "not-needed"),
)
prompt = sys.argv[1] if len(sys.argv) > 1 else "a yellow star on a blue background"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "frames")
folder.mkdir(parents=True, exist_ok=True)

for event in client.images.generate(prompt=prompt, size="256x256", stream=True, partial_images=2):
    partial = event.type == "image_generation.partial_image"
    path = folder / (f"partial-{event.partial_image_index}.png" if partial else "final.png")
    path.write_bytes(base64.b64decode(event.b64_json))
    print(path)
