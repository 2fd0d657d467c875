"""A model that makes sound, in two stages, served: from a request over HTTP to an MP4 file with two tracks."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import numpy as np
import pytest

from families.ltx2 import add_upsampler
from photogram.core.messages import GIVEN_BACK
from photogram.engine.frames_folder import SHARED_MEMORY
from running import Running, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")
FRAME_S = 1 / 24


@pytest.fixture(scope="module")
def sounding(family_folder, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("sounding") / "tiny-ltx-2"
    shutil.copytree(family_folder("ltx-2"), folder)
    add_upsampler(folder)
    card = {
        "default_width": 64,
        "default_height": 64,
        "default_frames": 25,
        "default_steps": 2,
        "defaults": {"stg_scale": 0.0, "audio_stg_scale": 0.0, "max_sequence_length": 64},
    }
    (folder / "photogram.json").write_text(json.dumps(card))
    server = serve(tmp_path_factory.mktemp("live-sound"), ["--model-path", str(folder)])
    yield server
    server.stop()


def tracks(data: bytes) -> tuple[int, float, np.ndarray, int]:
    """Frames, the sound track's seconds, its samples (channels, samples), and its rate."""
    with av.open(io.BytesIO(data)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert audio.codec_context.name == "aac"
        seconds, rate = float(audio.duration * audio.time_base), audio.rate
        num_frames = sum(1 for _ in container.decode(video))
    with av.open(io.BytesIO(data)) as container:
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    return num_frames, seconds, samples, rate


def test_clip_has_its_model_s_sound_as_long_as_its_frames(sounding):
    client = sounding.client()
    video = client.videos.create_and_poll(prompt="a red circle hums", poll_interval_ms=100)
    assert video.status == "completed", video.error
    num_frames, seconds, samples, rate = tracks(client.videos.download_content(video.id).read())
    assert num_frames == 25
    assert seconds == pytest.approx(25 * FRAME_S, abs=FRAME_S)
    assert (len(samples), rate) == (2, 24000)
    assert samples.std() > 0.01


def test_clip_of_two_stages_is_the_same_for_a_seed_and_another_than_that_of_one(sounding):
    client = sounding.client()
    assert client.models.list().data[0].model_extra["parameters"]["two_stages"] == "bool"
    clips = []
    for fields in ({}, {"two_stages": True}, {"two_stages": False}):
        video = client.videos.create_and_poll(
            prompt="a red circle hums", size="128x128", poll_interval_ms=100, extra_body={"seed": 7, **fields}
        )
        assert video.status == "completed", video.error
        assert (video.size, video.model_extra["generated_size"]) == ("128x128", "128x128")
        assert video.model_extra.get("warnings", []) == []
        clips.append(client.videos.download_content(video.id).read())
    assert clips[0] == clips[1] != clips[2]
    assert [tracks(clip)[0] for clip in clips] == [25, 25, 25]
    assert all(tracks(clip)[2].std() > 0.01 for clip in clips)


def test_progress_over_http_counts_the_steps_of_both_stages(sounding):
    answer = httpx.post(f"{sounding.url}/v1/videos", json={"prompt": "a red circle hums"}, timeout=60)
    assert answer.status_code == 200, answer.text
    with httpx.stream("GET", f"{sounding.url}/v1/videos/{answer.json()['id']}/events", timeout=60) as events:
        lines = [line.removeprefix("data: ") for line in events.iter_lines() if line.startswith("data: {")]
    reports = [report for report in map(json.loads, lines) if report.get("phase") == "denoise"]
    assert {report["num_steps"] for report in reports} == {5}  # two, and the three that refine
    assert [report["progress"] for report in reports] == sorted(report["progress"] for report in reports)
    assert json.loads(lines[-1])["video"]["status"] == "completed"


def test_what_is_added_to_a_clip_is_heard_after_what_was_heard_before(sounding):
    client = sounding.client()
    video = client.videos.create_and_poll(prompt="a red circle hums", poll_interval_ms=100)
    _, _, original, original_rate = tracks(client.videos.download_content(video.id).read())
    answer = httpx.post(
        f"{sounding.url}/v1/videos/extensions",
        json={"video": {"id": video.id}, "prompt": "it hums on", "num_frames": 8},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    longer = client.videos.poll(answer.json()["id"])
    assert longer.status == "completed", longer.error
    num_frames, seconds, samples, rate = tracks(client.videos.download_content(longer.id).read())
    assert num_frames == 33
    assert seconds == pytest.approx(33 * FRAME_S, abs=FRAME_S)
    begins = round(25 * FRAME_S * rate)
    assert samples[:, begins:].std() > 0.01
    assert rate == 2 * original_rate
    whole = round(24 * FRAME_S * original_rate)  # in the last frame the two fade into each other
    before, after = original[:, :whole], samples[:, ::2][:, :whole]
    # The model's weights are random, and its sound is little more than a level; silence would differ by all of it.
    assert np.sqrt(np.mean(before**2)) > 0.5
    assert np.sqrt(np.mean((after - before) ** 2)) < 0.15


def test_a_prompt_is_not_enhanced_without_the_processor_that_this_takes(sounding):
    answer = httpx.post(
        f"{sounding.url}/v1/videos", json={"prompt": "a red circle", "enable_prompt_enhancement": True}, timeout=60
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_by_model", "enable_prompt_enhancement")


def test_a_picture_of_a_model_with_sound_leaves_nothing_unread_in_shared_memory(sounding):
    picture = sounding.client().images.generate(prompt="a red circle", size="64x64")
    assert picture.data[0].b64_json
    name = f"photogram-{os.getuid()}-{sounding.process.pid}-*"
    folders = [found for root in (SHARED_MEMORY, Path(tempfile.gettempdir())) for found in root.glob(name)]
    assert len(folders) == 1
    # Large frames that were read are kept, to be written anew.
    assert [path for path in folders[0].iterdir() if path.suffix != GIVEN_BACK] == []
