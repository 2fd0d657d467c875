"""Make one picture with the OpenAI SDK and write it to a file.

python examples/generate_image.py "a red circle above a blue square" circle.png
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
prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle above a blue square on a white background"
path = Path(sys.argv[2] if len(sys.argv) > 2 else "output.png")

answer = client.images.generate(prompt=prompt, size="256x256", extra_body={"seed": 7})
picture = answer.data[0]
path.write_bytes(base64.b64decode(picture.b64_json))
print(f"{path}: seed {picture.seed}, {answer.size}")
