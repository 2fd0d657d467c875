"""Fifty clips and twenty pictures of one key and a few clips of another, all at once: who is answered before whom.

Told by the order of the ends in the job store, with the built-in video model, which also draws pictures.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import sqlite3
from dataclasses import dataclass

import av
import openai
import pytest
from PIL import Image

from running import serve

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning"),
]

NUM_CLIPS, NUM_PICTURES, NUM_OF_ANOTHER = 50, 20, 5
SIZE = (64, 48)
# Several times the work of a picture, else there is no reason to let pictures pass.
CLIP = {"num_frames": 17, "num_inference_steps": 8}


@dataclass(frozen=True)
class Load:
    """What came of it: ids, files, and for each id when it was accepted and when it ended."""

    clips: dict[str, bytes]
    clips_of_another: dict[str, bytes]
    pictures: dict[str, bytes]
    listed_by_another: list[str]
    accepted: dict[str, float]
    ended: dict[str, float]

    def share_after(self, end: float, ids: dict[str, bytes]) -> float:
        """Return the share of the jobs that ended later."""
        return sum(self.ended[each] > end for each in ids) / len(ids)


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Load:
    flags = ["--model-path", "demo-video", "--api-key", "one", "--api-key", "another"]
    server = serve(tmp_path_factory.mktemp("mixed-load"), flags)
    try:
        clips, others, pictures, listed = asyncio.run(ask_for_all(f"{server.url}/v1"))
    finally:
        server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "data" / "jobs.sqlite3")) as store:
        rows = store.execute("SELECT job_id, created_at, finished_at FROM jobs").fetchall()
    accepted, ended = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
    return Load(clips, others, pictures, listed, accepted, ended)


async def ask_for_all(url: str) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes], list[str]]:
    options = {"base_url": url, "timeout": 900, "max_retries": 0}
    size = f"{SIZE[0]}x{SIZE[1]}"
    async with (
        openai.AsyncOpenAI(api_key="one", **options) as one,
        openai.AsyncOpenAI(api_key="another", **options) as another,
    ):

        async def queued(client: openai.AsyncOpenAI, num: int) -> list[str]:
            settings = [CLIP | {"seed": seed} for seed in range(num)]
            return [
                (await client.videos.create(prompt="a red circle moves up", size=size, extra_body=each)).id
                for each in settings
            ]

        async def picture(number: int) -> tuple[str, bytes]:
            fields = {"num_inference_steps": 2, "seed": number}
            item = (await one.images.generate(prompt="a blue star", size=size, extra_body=fields)).data[0]
            return item.id, base64.b64decode(item.b64_json)

        async def clip(client: openai.AsyncOpenAI, video_id: str) -> tuple[str, bytes]:
            video = await client.videos.poll(video_id, poll_interval_ms=1000)
            assert video.status == "completed", video.error
            return video_id, (await client.videos.download_content(video_id)).content

        ids, ids_of_another = await queued(one, NUM_CLIPS), await queued(another, NUM_OF_ANOTHER)
        pictures = dict(await asyncio.gather(*(picture(number) for number in range(NUM_PICTURES))))
        clips = dict(await asyncio.gather(*(clip(one, each) for each in ids)))
        others = dict(await asyncio.gather(*(clip(another, each) for each in ids_of_another)))
        listed = [video.id async for video in another.videos.list()]
    return clips, others, pictures, listed


def test_each_of_them_is_answered_with_its_media(load):
    assert (len(load.clips), len(load.clips_of_another), len(load.pictures)) == (50, 5, 20)
    for data in (*load.clips.values(), *load.clips_of_another.values()):
        with av.open(io.BytesIO(data)) as container:
            assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [SIZE] * 17
    for data in load.pictures.values():
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == SIZE
    assert len(set(load.pictures.values())) == 20, "two seeds, one picture"


def test_pictures_are_answered_before_the_clips_that_were_queued_earlier(load):
    waiting = {
        each: data
        for each, data in load.clips.items()
        if load.ended[each] > max(load.accepted[picture] for picture in load.pictures)
    }
    assert len(waiting) > NUM_CLIPS / 2, "the clips were over before the pictures came"
    last_picture = max(load.ended[each] for each in load.pictures)
    # Those whose last step was under way or next are not held up.
    assert load.share_after(last_picture, waiting) > 0.7


def test_a_key_with_a_few_clips_is_not_kept_until_one_with_many_is_done(load):
    last_of_another = max(load.ended[each] for each in load.clips_of_another)
    # In the order of acceptance none of the fifty would be left.
    assert load.share_after(last_of_another, load.clips) > 0.1


def test_a_key_sees_its_own_clips_alone(load):
    assert sorted(load.listed_by_another) == sorted(load.clips_of_another)
