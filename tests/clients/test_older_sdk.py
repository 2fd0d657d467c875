"""The OpenAI SDK's major version 2, installed beside the current one, against the built-in model."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

SCRIPT = """
import asyncio, base64, sys
import openai
assert openai.__version__.startswith("2."), openai.__version__
url = sys.argv[1]
client = openai.OpenAI(base_url=url, api_key="sk-anything")
answer = client.images.generate(prompt="a red circle", size="256x256", n=2, response_format="b64_json",
                                extra_body={"seed": 3})
assert len(answer.data) == 2
assert base64.b64decode(answer.data[0].b64_json)[:4] == b"\\x89PNG"
strict = openai.OpenAI(base_url=url, api_key="sk-anything", _strict_response_validation=True)
assert strict.images.generate(prompt="a red circle", quality="high", size="1024x1024").usage.total_tokens > 0
events = [event.type for event in client.images.generate(prompt="a red circle", stream=True, partial_images=2)]
assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], events
assert client.models.list().data[0].id == "demo-image"
try:
    client.images.generate(prompt="a red circle", n=11)
except openai.BadRequestError as error:
    assert error.param == "n"
else:
    raise AssertionError("n=11 was accepted")

async def later():
    answer = await openai.AsyncOpenAI(base_url=url, api_key="sk-anything").images.generate(prompt="a blue star")
    assert answer.data[0].b64_json

asyncio.run(later())
print("done")
"""


CLIPS = """
import asyncio, sys, warnings
import openai
assert openai.__version__.startswith("2."), openai.__version__
warnings.simplefilter("ignore", DeprecationWarning)
options = {"base_url": sys.argv[1], "api_key": "sk-anything"}
client = openai.OpenAI(**options)
video = client.videos.create_and_poll(prompt="a cat", size="64x64", extra_body={"num_frames": 5}, poll_interval_ms=100)
assert (video.status, video.progress, video.error) == ("completed", 100, None), video
client.videos.download_content(video.id).write_to_file("clip.mp4")
with client.videos.with_streaming_response.download_content(video.id, variant="thumbnail") as answer:
    answer.stream_to_file("thumbnail.webp")
assert open("clip.mp4", "rb").read()[4:8] == b"ftyp"
assert open("thumbnail.webp", "rb").read()[8:12] == b"WEBP"
remix = client.videos.poll(client.videos.remix(video.id, prompt="a dog").id)
assert (remix.status, remix.remixed_from_video_id) == ("completed", video.id)
assert [one.id for one in client.videos.list(limit=1)][:2] == [remix.id, video.id]
failed = client.videos.create(prompt="a cat", extra_body={"num_inference_steps": 200, "num_frames": 33})
client.post(f"/videos/{failed.id}/cancel", cast_to=object)
failed = client.videos.poll(failed.id)
assert (failed.status, failed.error.code) == ("failed", "cancelled"), failed
try:
    client.videos.create(prompt="a cat", seconds="100")
except openai.BadRequestError as error:
    assert error.param == "seconds"
else:
    raise AssertionError("100 seconds were accepted")

async def later():
    client = openai.AsyncOpenAI(**options)
    video = await client.videos.create_and_poll(prompt="a dog", extra_body={"num_frames": 5}, poll_interval_ms=100)
    assert video.status == "completed"
    assert (await client.videos.delete(video.id)).deleted

asyncio.run(later())
print("done")
"""


@pytest.mark.parametrize("version", ["2.3.0", "2.54.0"])
def test_sdk_of_the_second_generation_works(version, live_server, tmp_path):
    run_with_sdk(version, SCRIPT, live_server, tmp_path)


@pytest.mark.parametrize("version", ["2.3.0", "2.54.0"])
def test_sdk_of_the_second_generation_makes_clips(version, clip_server, tmp_path):
    run_with_sdk(version, CLIPS, clip_server, tmp_path)


def run_with_sdk(version, script, server, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), f"openai=={version}"]
    subprocess.run(install, check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", script, f"{server.url}/v1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "done"
