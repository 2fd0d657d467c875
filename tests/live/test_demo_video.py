"""The built-in video model, served: clips from text and from a picture, over the whole of the Videos API."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from running import Running, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Iterator[Running]:
    server = serve(tmp_path_factory.mktemp("demo-video"), ["--model-path", "demo-video"])
    yield server
    server.stop()


def first_frame(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, (240, 240, 240))
    width, height = size
    centre, radius = (width // 3, height // 2), height // 5
    ImageDraw.Draw(picture).ellipse(
        (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius), fill=(220, 40, 40)
    )
    return picture


def made(server: Running, path: Path, **fields: object) -> tuple[object, np.ndarray]:
    """A finished clip and its frames (F, H, W, C)."""
    client = server.client()
    video = client.videos.create_and_poll(poll_interval_ms=200, **fields)
    return video, frames_of(client, video, path)


def frames_of(client: object, video: object, path: Path) -> np.ndarray:
    assert video.status == "completed", video.error
    client.videos.download_content(video.id).write_to_file(path)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def redness(frame: np.ndarray) -> np.ndarray:
    return frame[..., 0] - frame[..., 1:].max(axis=-1)


def test_text_gives_a_clip_of_the_size_asked_for(clips, tmp_path):
    video, frames = made(clips, tmp_path / "a.mp4", prompt="A calico cat playing a piano on stage", size="1280x720")
    assert frames.shape == (17, 720, 1280, 3)
    assert (video.size, video.model_extra["generated_size"]) == ("1280x720", "256x144")
    assert frames.std() > 10


def test_a_picture_is_the_first_frame_and_the_thing_in_it_moves_as_told(clips, tmp_path):
    picture = first_frame((256, 144))
    data = io.BytesIO()
    picture.save(data, "PNG")
    fields = {"input_reference": ("first.png", data.getvalue()), "size": "256x144", "extra_body": {"seed": 1}}
    _, frames = made(clips, tmp_path / "b.mp4", prompt="the circle moves to the right", **fields)
    error = np.square(frames[0] - np.asarray(picture).astype(int)).mean()
    assert 10 * np.log10(255**2 / error) > 25  # dB, through the video encoder too
    columns = np.arange(256)
    centres = [float((redness(frame).clip(40) - 40).sum(axis=0) @ columns) for frame in (frames[0], frames[-1])]
    weights = [float((redness(frame).clip(40) - 40).sum()) for frame in (frames[0], frames[-1])]
    assert centres[1] / weights[1] > centres[0] / weights[0] + 20


def test_clips_are_remixed_and_extended(clips, tmp_path):
    client, steps = clips.client(), {"num_inference_steps": 6}
    fields = {"prompt": "a red circle moves down", "size": "256x144", "extra_body": steps}
    video, frames = made(clips, tmp_path / "c.mp4", **fields)
    remix = client.videos.remix(video.id, prompt="a blue circle moves down", extra_body=steps)
    remixed = client.videos.poll(remix.id, poll_interval_ms=200)
    assert remixed.remixed_from_video_id == video.id
    assert frames_of(client, remixed, tmp_path / "d.mp4").shape == frames.shape
    body = {"video": {"id": video.id}, "prompt": "it moves up"} | steps
    answer = httpx.post(f"{clips.url}/v1/videos/extensions", json=body)
    extended = client.videos.poll(answer.json()["id"], poll_interval_ms=200)
    longer = frames_of(client, extended, tmp_path / "e.mp4")
    assert len(longer) == 2 * len(frames) - 1
    assert np.abs(longer[: len(frames)] - frames).mean() < 3  # of 255: the same clip, encoded again


def test_it_draws_pictures_too(clips):
    answer = clips.client().images.generate(prompt="a blue star", size="256x144")
    assert answer.data[0].b64_json
