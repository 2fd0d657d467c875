"""Clips from a real worker: every way to begin, real steps, real files."""

import asyncio
import io
import time

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def made(client, **fields):
    video = client.videos.create_and_poll(poll_interval_ms=100, **fields)
    assert video.status == "completed", video.error
    return video


def content(client, video):
    return client.videos.download_content(video.id).read()


@pytest.fixture
def client(clip_server):
    return clip_server.client()


def picture():
    y, x = np.mgrid[0:64, 0:64]
    file = io.BytesIO()
    Image.fromarray(np.stack([x * 4, y * 4, 0 * x + 90], -1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_clip_has_its_length_its_size_and_its_own_content(client):
    video = made(client, prompt="a cat", size="64x96", seconds="1", extra_body={"seed": 3, "fps": 8})
    assert (video.num_frames, video.fps, video.seconds, video.size) == (9, 8, "1.12", "64x96")
    found = frames_of(content(client, video))
    assert found.shape == (9, 96, 64, 3)
    assert found.std() > 5


def test_the_same_seed_gives_the_same_file_and_another_seed_another(client):
    first, again, other = (
        made(client, prompt="a cat", extra_body={"seed": seed, "num_frames": 5, "deterministic": True})
        for seed in (7, 7, 8)
    )
    assert content(client, first) == content(client, again)
    assert content(client, first) != content(client, other)


def test_progress_counts_the_real_steps_and_ends_at_100(clip_server, client):
    video = client.videos.create(prompt="a cat", extra_body={"num_inference_steps": 60, "num_frames": 17, "seed": 1})
    told, steps = [], []
    with httpx.stream("GET", f"{clip_server.url}/v1/videos/{video.id}/events", timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data = httpx.Response(200, content=line[6:]).json()
                told.append(data.get("progress", data.get("video", {}).get("progress")))
                if data["type"] == "video.progress" and data["phase"] == "denoise":
                    steps.append(data["step"])
                    assert data["num_steps"] == 60
    assert told == sorted(told)
    assert told[-1] == 100
    assert set(told[:-1]) <= set(range(100))
    assert steps == sorted(set(steps))  # each once, though guidance makes two calls of it
    assert len(steps) > 20  # the first may be over before anybody watches


def test_a_cancelled_clip_stops_within_a_step(clip_server, client):
    video = client.videos.create(prompt="a cat", extra_body={"num_inference_steps": 200, "num_frames": 33})
    while client.videos.retrieve(video.id).progress == 0:
        time.sleep(0.05)
    cancelled = httpx.post(f"{clip_server.url}/v1/videos/{video.id}/cancel", timeout=30).json()
    assert cancelled["error"]["code"] == "cancelled"
    started = time.monotonic()
    made(client, prompt="a dog", extra_body={"num_frames": 5})
    assert time.monotonic() - started < 60  # 200 steps of the first one would take longer


def test_an_input_picture_is_where_the_clip_begins(client):
    video = made(
        client, prompt="it moves", input_reference=("a.png", picture(), "image/png"), extra_body={"num_frames": 9}
    )
    assert frames_of(content(client, video)).shape == (9, 64, 64, 3)


def test_clips_are_remixed_edited_and_extended(client):
    original = made(client, prompt="a cat", extra_body={"num_frames": 9, "seed": 1, "output_compression": 95})
    before = frames_of(content(client, original)).astype(int)
    near, far = (
        client.videos.poll(
            client.videos.remix(
                original.id, prompt="a dog", extra_body={"strength": strength, "seed": 2, "num_inference_steps": 10}
            ).id
        )
        for strength in (0.1, 1.0)
    )
    assert (near.status, far.status, near.remixed_from_video_id) == ("completed", "completed", original.id)
    edited = client.videos.poll(client.videos.edit(prompt="a dog", video=content(client, original)).id)
    assert (edited.status, edited.num_frames) == ("completed", 9), edited.error
    extended = client.videos.poll(
        client.videos.extend(
            prompt="on", seconds="1", video=content(client, original), extra_body={"output_compression": 95}
        ).id
    )
    assert (extended.status, extended.num_frames) == ("completed", 25), extended.error
    after = frames_of(content(client, extended)).astype(int)
    assert after.shape == (25, 64, 64, 3)
    # Drawn from random weights, it is mostly noise, which a clip's file keeps least.
    assert np.abs(before - after[:9]).mean() < 8 < np.abs(before - after[9:18]).mean()


def test_a_model_of_clips_draws_pictures(client):
    answer = client.images.generate(prompt="a cat", size="64x64", n=2, extra_body={"seed": 5})
    assert [item.seed for item in answer.data] == [5, 6]


def test_pictures_overtake_clips_that_wait(clip_server):
    """50 clips are queued, then 20 pictures are asked for: the pictures do not wait for the clips."""

    async def work():
        options = {"base_url": f"{clip_server.url}/v1", "api_key": "sk-anything", "timeout": 300, "max_retries": 0}
        async with openai.AsyncOpenAI(**options) as client:
            settings = {"num_frames": 33, "num_inference_steps": 30}
            ids = [
                (await client.videos.create(prompt=f"clip {number}", extra_body=settings)).id for number in range(50)
            ]
            pictures = await asyncio.gather(
                *(client.images.generate(prompt=f"picture {number}", size="64x64") for number in range(20))
            )
            assert [len(picture.data) for picture in pictures] == [1] * 20
            states = [(await client.videos.retrieve(video_id)).status for video_id in ids]
            assert states.count("completed") < 25
            finished = await asyncio.gather(*(client.videos.poll(video_id, poll_interval_ms=500) for video_id in ids))
            assert {video.status for video in finished} == {"completed"}

    asyncio.run(work())
