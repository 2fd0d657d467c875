"""Eight clients at once, each with its own number of steps: their calls share forward passes.

python examples/many_clients.py pictures
"""

import asyncio
import base64
import os
import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

STEPS = (4, 5, 6, 8, 10, 12, 14, 16)
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")


async def draw(client: AsyncOpenAI, colour: str, steps: int, path: Path) -> None:
    started = time.perf_counter()
    answer = await client.images.generate(
        prompt=f"a {colour} circle", size="256x256", extra_body={"num_inference_steps": steps, "seed": steps}
    )
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    print(f"{path}: {steps} steps, {time.perf_counter() - started:.1f} s")


async def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    base_url = os.environ.get("PHOTOGRAM_URL", "http://localhost:30000") + "/v1"
    api_key = os.environ.get("PHOTOGRAM_API_KEY", "not-needed")
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for colour, steps in zip(COLOURS, STEPS, strict=True):
                group.create_task(draw(client, colour, steps, folder / f"{colour}.png"))
        print(f"{len(STEPS)} pictures in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
