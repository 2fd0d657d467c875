"""The examples of SGLang Diffusion's API page for videos, as a user pastes them; only the addresses differ."""

import json
import os
import subprocess
import sys

import av
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")

CREATE = """
from openai import OpenAI

client = OpenAI(api_key="sk-proj-1234567890", base_url="http://localhost:30010/v1")

video = client.videos.create(
prompt="A calico cat playing a piano on stage",
size="1280x720"
)
print(f"Video ID: {video.id}, Status: {video.status}")
"""

LIST = """
videos = client.videos.list()
for item in videos.data:
    print(item.id, item.status)
"""

DOWNLOAD = """
import time

# Poll for completion
while True:
    page = client.videos.list()
    item = next((v for v in page.data if v.id == video_id), None)
    if item and item.status == "completed":
        break
    time.sleep(5)

# Download content
resp = client.videos.download_content(video_id=video_id)
with open("output.mp4", "wb") as f:
    f.write(resp.read())
"""

CURL_CREATE = r"""
curl -sS -X POST "http://localhost:30010/v1/videos" \
-H "Content-Type: application/json" \
-H "Authorization: Bearer sk-proj-1234567890" \
-d '{
"prompt": "A calico cat playing a piano on stage",
"size": "1280x720"
}'
"""

CURL_UPLOAD = r"""
curl -sS -X POST "http://localhost:30010/v1/videos" \
-H "Authorization: Bearer sk-proj-1234567890" \
-F "prompt=A cat playing a piano" \
-F "input_reference=@input_image.png" \
-F "size=1280x720"
"""

CURL_URL = r"""
curl -sS -X POST "http://localhost:30010/v1/videos" \
-H "Content-Type: application/json" \
-H "Authorization: Bearer sk-proj-1234567890" \
-d '{
"prompt": "A cat playing a piano",
"reference_url": "https://example.com/input_image.png",
"size": "1280x720"
}'
"""

CURL_LIST = r"""
curl -sS -X GET "http://localhost:30010/v1/videos" \
-H "Authorization: Bearer sk-proj-1234567890"
"""

CURL_DOWNLOAD = r"""
curl -sS -L "http://localhost:30010/v1/videos/<VIDEO_ID>/content" \
-H "Authorization: Bearer sk-proj-1234567890" \
-o output.mp4
"""


@pytest.fixture
def shell(clip_server, picture_url, tmp_path):
    Image.new("RGB", (320, 180), (200, 90, 30)).save(tmp_path / "input_image.png")

    def run(script: str) -> str:
        script = script.replace("http://localhost:30010", clip_server.url)
        script = script.replace("https://example.com/input_image.png", picture_url)
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"no_proxy": "*"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def size_of(path):
    with av.open(path) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, stream.frames


def finished(clip_server, answer):
    video = json.loads(answer)
    assert video["status"] == "queued"
    done = clip_server.client().videos.poll(video["id"], poll_interval_ms=200)
    assert done.status == "completed", done.error
    return video["id"]


def test_the_python_examples_one_after_the_other(clip_server, tmp_path):
    source = "\n".join([CREATE, LIST, "video_id = video.id", DOWNLOAD]).replace(
        "http://localhost:30010", clip_server.url
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        cwd=tmp_path,
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "Status: queued" in done.stdout
    assert size_of(tmp_path / "output.mp4") == (1280, 720, 17)


def test_the_curl_examples_create_list_and_download(clip_server, shell, tmp_path):
    video_id = finished(clip_server, shell(CURL_CREATE))
    listed = {video["id"]: video["status"] for video in json.loads(shell(CURL_LIST))["data"]}
    assert listed[video_id] == "completed"
    shell(CURL_DOWNLOAD.replace("<VIDEO_ID>", video_id))
    assert size_of(tmp_path / "output.mp4") == (1280, 720, 17)


@pytest.mark.parametrize("example", [CURL_UPLOAD, CURL_URL], ids=["upload", "url"])
def test_the_curl_examples_begin_with_a_picture(clip_server, shell, example, tmp_path):
    video_id = finished(clip_server, shell(example))
    shell(CURL_DOWNLOAD.replace("<VIDEO_ID>", video_id))
    assert size_of(tmp_path / "output.mp4") == (1280, 720, 17)


def test_models_answers_the_seven_keys(clip_server, shell):
    facts = json.loads(shell('curl -sS -X GET "http://localhost:30010/models"'))
    assert facts["pipeline_class"] == "WanPipeline"
    assert facts["pipeline_name"] == "wan_pipeline"
    assert facts["task_type"] in ("T2V", "TI2V")
    assert facts["num_gpus"] == 1
    assert facts["dit_precision"] == facts["vae_precision"] == "fp32"
    assert facts["model_path"]
