"""The Videos API over HTTP and the official SDK, with an engine that draws at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from photogram.core.config import ServeConfig
from photogram.media.provenance import read_provenance

from .conftest import Deployment, wait_until
from .fake_engine import FakeEngine, image_card, video_card
from .test_webhooks import receiver

EVERYTHING = ("TI2V", "T2V", "I2V", "V2V")
FIELDS = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size",
    "seconds", "remixed_from_video_id", "error", "seed", "fps", "num_frames", "generated_size", "quality_mode",
    "eta_s", "warnings",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServeConfig(port=0, data_dir=str(tmp_path_factory.mktemp("data")))
    card = video_card(tasks=EVERYTHING, max_frames=81, max_input_images=1)
    deployment = Deployment(config, lambda frames_dir: FakeEngine(frames_dir, card))
    yield deployment
    deployment.stop()


@pytest.fixture
def client(server):
    return server.client(_strict_response_validation=False)


def create(server, **fields):
    answer = server.post("/v1/videos", json={"prompt": "a cat", "num_frames": 5, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def finished(server, video_id):
    found = {}

    def is_over():
        found.update(server.get(f"/v1/videos/{video_id}").json())
        return found["status"] in ("completed", "failed")

    wait_until(is_over)
    return found


def made(server, **fields):
    video = finished(server, create(server, **fields)["id"])
    assert video["status"] == "completed", video
    return video


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def content(server, video_id, **options):
    answer = server.get(f"/v1/videos/{video_id}/content", **options)
    assert answer.status_code in (200, 206), answer.text
    return answer.content


def error(answer, status):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["detail"] == body["error"]["message"]
    return body["error"]


def png(width=128, height=96, colour=(20, 120, 220)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def events(server, video_id, limit=200, on_first=lambda: None):
    """(event, data) of a clip's stream, to its end; `on_first` is called once it is being followed."""
    found = []
    with httpx.stream("GET", f"{server.url}/v1/videos/{video_id}/events", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found.append((name, json.loads(line[6:])))
                if len(found) == 1:
                    on_first()
    assert len(found) < limit
    return found


# --- making one ---------------------------------------------------------------------------------------------------


def test_a_clip_is_queued_at_once_and_completed_later(server):
    video = create(server, seed=7, model="sora-2")
    assert set(video) == FIELDS
    assert (video["object"], video["status"], video["progress"], video["error"]) == ("video", "queued", 0, None)
    assert video["id"].startswith("video_")
    assert (video["model"], video["prompt"], video["seed"]) == ("sora-2", "a cat", 7)
    assert (video["size"], video["seconds"], video["fps"], video["num_frames"]) == ("64x48", "0.31", 16, 5)
    assert (video["completed_at"], video["expires_at"], video["eta_s"]) == (None, None, None)
    done = finished(server, video["id"])
    assert (done["status"], done["progress"]) == ("completed", 100)
    assert done["completed_at"] >= done["created_at"]
    assert done["expires_at"] == pytest.approx(done["completed_at"] + 7 * 86400, abs=1)
    data = content(server, video["id"])
    assert frames_of(data).shape == (5, 48, 64, 3)
    assert (read_provenance(data).seed, read_provenance(data).num_frames) == (7, 5)


def test_a_clip_in_a_lossy_mode_says_so_and_so_does_its_file(server):
    video = create(server, quality_mode="fast", num_inference_steps=30)
    assert (video["quality_mode"], video["warnings"]) == ("fast", [])
    done = finished(server, video["id"])
    assert done["quality_mode"] == read_provenance(content(server, video["id"])).quality_mode == "fast"
    assert create(server)["quality_mode"] == "exact"


def test_a_form_says_the_same_as_json(server):
    fields = {"prompt": "a cat", "size": "96x64", "seconds": "0.5", "seed": "3", "num_inference_steps": "2"}
    for sent in (
        {"data": fields},
        {"files": {name: (None, value) for name, value in fields.items()}},
        {"json": fields},
    ):
        answer = server.post("/v1/videos", **sent).json()
        assert (answer["size"], answer["num_frames"], answer["seed"]) == ("96x64", 9, 3)
        finished(server, answer["id"])
        assert server.engine.seen[answer["id"]].num_inference_steps == 2


def test_the_file_has_the_size_asked_for_and_the_object_tells_what_was_drawn(server):
    video = made(server, size="100x70")
    assert (video["size"], video["generated_size"]) == ("100x70", "112x80")
    assert frames_of(content(server, video["id"])).shape == (5, 70, 100, 3)


def test_odd_sides_are_told_in_a_header_and_in_the_object(server):
    answer = server.post("/v1/videos", json={"prompt": "a cat", "size": "101x71", "num_frames": 5})
    assert answer.headers["x-photogram-warning"].startswith("The sides of a clip are even: it has 102x72")
    assert answer.json()["warnings"] == [answer.headers["x-photogram-warning"]]
    assert finished(server, answer.json()["id"])["size"] == "102x72"
    assert frames_of(content(server, answer.json()["id"])).shape == (5, 72, 102, 3)


def test_what_has_no_effect_is_named(server):
    answer = server.post("/v1/videos", json={"prompt": "a cat", "num_frames": 5, "strength": 0.5, "style": "x", "u": 1})
    assert answer.headers["x-photogram-ignored"] == "u, strength"


def test_quality_makes_larger_files(server):
    sizes = [len(content(server, made(server, seed=1, **{"output-quality": word})["id"])) for word in ("low", "high")]
    assert sizes[0] < sizes[1]
    same = [content(server, made(server, seed=1, output_quality="low", output_compression=90)["id"])]
    assert len(same[0]) == sizes[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 32001}, "prompt"),
        ({"seconds": 60}, "seconds"),
        ({"num_frames": 10**9}, "num_frames"),
        ({"size": "10x10"}, "size"),
        ({"size": "9999x9999"}, "size"),
        ({"fps": 1000}, "fps"),
        ({"seed": -1}, "seed"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"output_quality": "best"}, "output_quality"),
        ({"output_compression": 101}, "output_compression"),
        ({"n": 4}, "n"),
        ({"task_type": "t2i"}, "task_type"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(server, fields, param):
    before = len(server.engine.seen)
    found = error(server.post("/v1/videos", json={"prompt": "a cat", **fields}), 400)
    assert (found["param"], found["type"]) == (param, "invalid_request_error")
    assert len(server.engine.seen) == before


def test_the_limit_names_the_longest_that_can_be(server):
    found = error(server.post("/v1/videos", json={"prompt": "a cat", "seconds": "20"}), 400)
    assert "at most 81 (5.06 s)" in found["message"]


# --- with a picture -----------------------------------------------------------------------------------------------


def test_an_input_picture_is_the_first_frame_however_it_comes(server):
    data_url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    fields = {"prompt": "a cat", "num_frames": "5", "size": "64x48"}
    sent = (
        {"data": fields, "files": {"input_reference": ("a.png", png(), "image/png")}},
        {"data": fields, "files": {"input_reference": ("upload", png(), "application/octet-stream")}},
        {"json": {**fields, "input_reference": {"image_url": data_url}}},
        {"json": {**fields, "input_reference": data_url}},
        {"json": {**fields, "reference_url": data_url}},
        {"data": {**fields, "input_reference[image_url]": data_url}, "files": {"x": (None, "")}},
    )
    for one in sent:
        answer = server.post("/v1/videos", **one)
        assert answer.status_code == 200, answer.text
        video = finished(server, answer.json()["id"])
        assert video["status"] == "completed", video
        assert server.engine.seen[video["id"]].task == "I2V"
        first = frames_of(content(server, video["id"]))[0]
        assert np.abs(first.astype(int) - (20, 120, 220)).mean() < 4


def test_a_picture_gives_the_aspect_and_is_cropped_not_stretched(server):
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[:, 50:150] = 255
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    answer = server.post(
        "/v1/videos", data={"prompt": "a cat", "num_frames": "5"}, files={"input_reference": file.getvalue()}
    ).json()
    assert answer["size"] == "80x32"
    answer = server.post(
        "/v1/videos",
        data={"prompt": "a cat", "num_frames": "5", "size": "64x64"},
        files={"input_reference": file.getvalue()},
    ).json()
    finished(server, answer["id"])
    first = frames_of(content(server, answer["id"]))[0]
    assert first[:, 4:60].min() > 200  # the white half fills the square


def test_pictures_that_are_none_are_refused_with_their_field(server):
    for field in ("input_reference", "reference_url"):
        for value in (
            "no-picture.png",
            "data:image/png;base64,AAAA",
            {"image_url": "data:,x"},
            {"file_id": "file_none"},
        ):
            answer = server.post("/v1/videos", json={"prompt": "a cat", field: value})
            assert error(answer, answer.status_code)["param"] == field
            assert answer.status_code in (400, 404)
    two = [("input_reference[]", ("a.png", png(), "image/png"))] * 2
    assert error(server.post("/v1/videos", data={"prompt": "a cat"}, files=two), 400)["param"] == "input_reference"


def test_nothing_of_the_inputs_is_left(server):
    inputs = Path(server.config.data_dir) / "inputs"
    wait_until(lambda: not inputs.exists() or list(inputs.iterdir()) == [])
    wait_until(lambda: server.leftover_frames() == [])


# --- by its id ----------------------------------------------------------------------------------------------------


def test_an_unfinished_clip_has_progress_that_never_falls_and_no_content(server):
    video_id = create(server, prompt="hold a cat", num_inference_steps=4)["id"]
    try:
        wait_until(lambda: server.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress")
        answer = server.get(f"/v1/videos/{video_id}")
        assert answer.headers["openai-poll-after-ms"].isdecimal()
        assert 0 <= answer.json()["progress"] <= 99
        found = error(server.get(f"/v1/videos/{video_id}/content"), 404)
        assert found["code"] == "video_not_ready"
    finally:
        server.engine.released.set()
    finished(server, video_id)
    server.engine.released.clear()
    assert "openai-poll-after-ms" not in server.get(f"/v1/videos/{video_id}").headers


def test_a_failed_clip_is_an_object_with_an_error(server):
    video = finished(server, create(server, prompt="fail:out_of_memory")["id"])
    assert video["status"] == "failed"
    assert video["error"] == {"code": "out_of_memory", "message": "It went wrong: no luck today.", "param": None}
    assert video["completed_at"] is None
    found = error(server.get(f"/v1/videos/{video['id']}/content"), 404)
    assert found["code"] == "video_failed"
    assert "no luck today" in found["message"]


def test_a_cancelled_clip_is_failed_with_the_code_and_its_work_ends(server):
    video_id = create(server, prompt="hold a cat")["id"]
    wait_until(lambda: server.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress")
    cancelled = server.post(f"/v1/videos/{video_id}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    wait_until(lambda: video_id in server.engine.cancelled)
    again = server.post(f"/v1/videos/{video_id}/cancel")
    assert (again.status_code, again.json()) == (200, cancelled)
    assert error(server.get(f"/v1/videos/{video_id}/content"), 404)["code"] == "video_failed"


def test_cancelling_a_finished_clip_changes_nothing(server):
    video = made(server)
    assert server.post(f"/v1/videos/{video['id']}/cancel").json() == video


def test_a_deleted_clip_is_gone_with_its_file(server):
    video = made(server)
    files = Path(server.config.data_dir) / "files"
    assert list(files.rglob(f"{video['id']}*"))
    answer = httpx.delete(f"{server.url}/v1/videos/{video['id']}")
    assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert not list(files.rglob(f"{video['id']}*"))
    for response in (
        server.get(f"/v1/videos/{video['id']}"),
        server.get(f"/v1/videos/{video['id']}/content"),
        server.get(f"/v1/videos/{video['id']}/events"),
        httpx.delete(f"{server.url}/v1/videos/{video['id']}"),
        server.post(f"/v1/videos/{video['id']}/cancel"),
        server.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "x"}),
    ):
        assert error(response, 404)["code"] == "video_not_found"


def test_deleting_stops_the_work(server):
    video_id = create(server, prompt="hold a cat")["id"]
    wait_until(lambda: server.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress")
    assert httpx.delete(f"{server.url}/v1/videos/{video_id}", timeout=20).status_code == 200
    assert video_id in server.engine.cancelled
    assert server.get(f"/v1/videos/{video_id}").status_code == 404


def test_odd_ids_are_unknown_and_no_fault(server):
    for odd in ("video_x", "a%2Fb", "..", "%00", "x" * 300, "img_" + "0" * 32):
        assert server.get(f"/v1/videos/{odd}").status_code in (404, 405)


def test_a_picture_is_no_video(server):
    item = server.post("/v1/images/generations", json={"prompt": "a cat"}).json()["data"][0]
    assert error(server.get(f"/v1/videos/{item['id']}"), 404)["code"] == "video_not_found"


# --- content ------------------------------------------------------------------------------------------------------


def test_content_in_parts_by_head_and_by_tag(server):
    video_id = made(server)["id"]
    url = f"/v1/videos/{video_id}/content"
    whole = server.get(url)
    assert whole.headers["content-type"] == "video/mp4"
    assert int(whole.headers["content-length"]) == len(whole.content)
    head = httpx.head(server.url + url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole.content)), b"")
    part = server.get(url, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    assert server.get(url, headers={"Range": "bytes=99999999-"}).status_code == 416
    assert server.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    ("variant", "kind", "format", "size"),
    [("thumbnail", "image/webp", "WEBP", (64, 48)), ("spritesheet", "image/jpeg", "JPEG", (5 * 64, 48))],
)
def test_a_clip_has_pictures(server, variant, kind, format, size):
    url = f"/v1/videos/{made(server)['id']}/content?variant={variant}"
    answer = server.get(url)
    assert answer.headers["content-type"] == kind
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert (picture.format, picture.size) == (format, size)
    assert server.get(url).content == answer.content
    head = httpx.head(server.url + url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))
    assert server.get(url, headers={"Range": "bytes=0-3"}).content == answer.content[:4]


def test_an_unknown_variant_is_refused(server):
    video_id = made(server)["id"]
    assert error(server.get(f"/v1/videos/{video_id}/content?variant=gif"), 400)["param"] == "variant"
    assert server.get(f"/v1/videos/{video_id}/content?variant=video").status_code == 200


# --- the list -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(deploy):
    return deploy(card=video_card(tasks=EVERYTHING, max_frames=81))


def test_pages_follow_each_other_in_both_orders(alone):
    empty = alone.get("/v1/videos").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    ids = [create(alone)["id"] for _ in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        found, after = [], None
        while True:
            page = alone.get("/v1/videos", params={"limit": 2, "order": order, **({"after": after} if after else {})})
            page = page.json()
            found += [video["id"] for video in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert found == expected
    assert [video["id"] for video in alone.get("/v1/videos").json()["data"]] == ids[::-1]
    alone.post("/v1/images/generations", json={"prompt": "a cat"})
    assert len(alone.get("/v1/videos").json()["data"]) == 5


def test_the_sdk_pages_through_the_list_and_may_delete_on_its_way(alone):
    ids = {create(alone)["id"] for _ in range(5)}
    client = alone.client(_strict_response_validation=False)
    assert {video.id for video in client.videos.list(limit=2)} == ids
    for video in client.videos.list(limit=1):
        client.videos.delete(video.id)
    assert list(client.videos.list()) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=101", "limit"), ("limit=-1", "limit"), ("order=up", "order"), ("after=video_x", "after")],
)
def test_what_a_page_cannot_be_is_refused(server, query, param):
    assert error(server.get(f"/v1/videos?{query}"), 400)["param"] == param


def test_another_keys_videos_are_not_there(deploy):
    server = deploy(card=video_card(), api_key=("ann", "bob"))
    ann, bob = ({"headers": {"Authorization": f"Bearer {key}"}} for key in ("ann", "bob"))
    video = server.post("/v1/videos", json={"prompt": "a cat"}, **ann).json()
    assert len(server.get("/v1/videos", **ann).json()["data"]) == 1
    assert server.get("/v1/videos", **bob).json()["data"] == []
    for path in ("", "/content", "/events"):
        assert error(server.get(f"/v1/videos/{video['id']}{path}", **bob), 404)["code"] == "video_not_found"
    assert httpx.delete(f"{server.url}/v1/videos/{video['id']}", **bob).status_code == 404
    assert server.get("/v1/videos").status_code == 401


# --- events -------------------------------------------------------------------------------------------------------


def test_events_tell_states_steps_and_pictures_and_end_with_the_clip(server):
    video_id = create(server, prompt="hold a cat", num_inference_steps=6, partial_images=2, size="96x64")["id"]
    loop = asyncio.new_event_loop()
    followed = threading.Event()
    watching = loop.run_in_executor(None, lambda: events(server, video_id, on_first=followed.set))
    assert followed.wait(15)
    wait_until(lambda: server.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress")
    server.engine.released.set()
    found = loop.run_until_complete(watching)
    loop.close()
    server.engine.released.clear()
    names = [name for name, _ in found]
    assert all(name == data["type"] for name, data in found)
    assert names[-1] == "video.completed"
    assert found[-1][1]["video"] == server.get(f"/v1/videos/{video_id}").json()
    steps = [data for name, data in found if name == "video.progress"]
    assert [step["step"] for step in steps] == sorted(step["step"] for step in steps)
    assert [step["progress"] for step in steps] == sorted(step["progress"] for step in steps)
    assert max(step["progress"] for step in steps) < 100
    assert all(step["num_steps"] == 6 and step["id"] == video_id for step in steps)
    previews = [data for name, data in found if name == "video.preview"]
    assert previews
    with Image.open(io.BytesIO(base64.b64decode(previews[0]["b64_json"]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (96, 64))


def test_events_of_a_finished_clip_are_its_end(server):
    video = made(server)
    assert events(server, video["id"]) == [("video.completed", {"type": "video.completed", "video": video})]
    failed = finished(server, create(server, prompt="fail:generation_failed")["id"])
    ((name, data),) = events(server, failed["id"])
    assert (name, data["video"]["error"]["code"]) == ("video.failed", "generation_failed")


def test_a_watcher_that_leaves_does_not_end_the_clip(server):
    video_id = create(server, prompt="hold a cat")["id"]
    with httpx.stream("GET", f"{server.url}/v1/videos/{video_id}/events", timeout=20) as answer:
        next(answer.iter_lines())
    assert video_id not in server.engine.cancelled
    server.engine.released.set()
    assert finished(server, video_id)["status"] == "completed"
    server.engine.released.clear()


# --- at once ------------------------------------------------------------------------------------------------------


def test_sync_answers_with_the_file(server):
    answer = server.post("/v1/videos/sync", json={"prompt": "a cat", "num_frames": 5, "seed": 4, "size": "101x64"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert frames_of(answer.content).shape == (5, 64, 102, 3)
    assert "even" in answer.headers["x-photogram-warning"]
    assert content(server, answer.headers["x-photogram-video-id"]) == answer.content


def test_sync_answers_a_failure_as_an_error(server):
    answer = server.post("/v1/videos/sync", json={"prompt": "fail:out_of_memory"})
    assert error(answer, 507)["code"] == "out_of_memory"


def test_a_client_that_leaves_sync_ends_its_clip(server):
    before = set(server.engine.seen)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/videos/sync", json={"prompt": "hold a cat"}, timeout=1)
    (video_id,) = set(server.engine.seen) - before
    wait_until(lambda: video_id in server.engine.cancelled)
    wait_until(lambda: finished(server, video_id)["error"]["code"] == "cancelled")


# --- clips from clips ---------------------------------------------------------------------------------------------


def test_a_remix_draws_the_clip_anew(server):
    original = made(server, size="100x70", num_frames=9, fps=8, seed=1)
    answer = server.post(f"/v1/videos/{original['id']}/remix", json={"prompt": "a dog", "strength": 0.5})
    video = finished(server, answer.json()["id"])
    assert video["status"] == "completed", video
    assert video["remixed_from_video_id"] == original["id"]
    assert [video[name] for name in ("size", "num_frames", "fps", "prompt")] == ["100x70", 9, 8, "a dog"]
    request = server.engine.seen[video["id"]]
    assert (request.task, request.strength, request.width, request.height) == ("V2V", 0.5, 112, 80)
    before, after = (frames_of(content(server, one["id"])).astype(int) for one in (original, video))
    assert np.abs(before - after).mean() < 12  # the engine keeps the clip


def test_a_clip_that_is_not_finished_cannot_be_remixed(server):
    failed = finished(server, create(server, prompt="fail:generation_failed")["id"])
    answer = server.post(f"/v1/videos/{failed['id']}/remix", json={"prompt": "a dog"})
    assert error(answer, 404)["code"] == "video_failed"


@pytest.mark.parametrize("endpoint", ["edits", "extensions"])
def test_clips_come_as_files_as_ids_and_as_objects(server, endpoint):
    original = made(server, num_frames=9, seed=2)
    data = content(server, original["id"])
    url = f"/v1/videos/{endpoint}"
    fields = {"prompt": "a dog", "seconds": "0.5"}
    sent = (
        {"data": fields, "files": {"video": ("clip.mp4", data, "video/mp4")}},
        {"data": {**fields, "video[id]": original["id"]}, "files": {"x": (None, "")}},
        {"json": {**fields, "video": {"id": original["id"]}}},
        {"json": {**fields, "video": original["id"]}},
    )
    for one in sent:
        answer = server.post(url, **one)
        assert answer.status_code == 200, answer.text
        video = finished(server, answer.json()["id"])
        assert video["status"] == "completed", video
        assert video["num_frames"] == (9 if endpoint == "edits" else 17)
        assert len(frames_of(content(server, video["id"]))) == video["num_frames"]
        assert video["remixed_from_video_id"] == (
            None if "files" in one and "data" in one and "video" in one["files"] else original["id"]
        )


def test_an_extension_goes_on_from_the_last_frame(server):
    original = made(server, num_frames=9, seed=3, output_compression=95)
    answer = server.post(
        "/v1/videos/extensions",
        json={"prompt": "on", "video": {"id": original["id"]}, "seconds": 1, "output_compression": 95},
    )
    assert (answer.json()["num_frames"], answer.json()["seconds"]) == (25, "1.56")
    video = finished(server, answer.json()["id"])
    before, after = (frames_of(content(server, one["id"])).astype(int) for one in (original, video))
    assert after.shape == (25, 48, 64, 3)
    assert np.abs(before - after[:9]).mean() < 3
    # The engine keeps the first frame that it is given but for a bar.
    assert np.abs(before[8] - after[10]).mean() < 12


def test_an_upload_is_edited_in_its_aspect_and_length(server):
    data = content(server, made(server, size="128x64", num_frames=17, fps=30)["id"])
    answer = server.post("/v1/videos/edits", data={"prompt": "a dog"}, files={"video": data})
    video = finished(server, answer.json()["id"])
    assert (video["size"], video["fps"], video["num_frames"]) == ("80x32", 16, 9)


def test_what_is_no_clip_is_refused_with_its_field(server):
    for endpoint in ("edits", "extensions"):
        url = f"/v1/videos/{endpoint}"
        assert error(server.post(url, json={"prompt": "x"}), 400)["param"] == "video"
        assert error(server.post(url, data={"prompt": "x"}, files={"video": b"nothing"}), 400)["param"] == "video"
        assert error(server.post(url, data={"prompt": "x"}, files={"video": png()}), 400)["code"] == "invalid_video"
        assert (
            error(server.post(url, json={"prompt": "x", "video": {"id": "video_x"}}), 404)["code"] == "video_not_found"
        )
        assert error(server.post(url, json={"prompt": "x", "video": {"id": 3}}), 400)["param"] == "video"
        two = [("video", ("a.mp4", b"x", "video/mp4"))] * 2
        assert error(server.post(url, data={"prompt": "x"}, files=two), 400)["param"] == "video"


def test_a_model_that_cannot_says_so_before_it_reads_anything(deploy):
    server = deploy(card=video_card())
    video = made(server)
    before = len(server.engine.seen)
    cases = [
        ("/v1/videos", {"files": {"input_reference": b"no picture"}, "data": {"prompt": "x"}}, "input_reference"),
        ("/v1/videos", {"json": {"prompt": "x", "reference_url": "http://127.0.0.1:1/a.png"}}, "reference_url"),
        ("/v1/videos/edits", {"json": {"prompt": "x", "video": {"id": video["id"]}}}, "video"),
        ("/v1/videos/extensions", {"files": {"video": b"no clip"}, "data": {"prompt": "x"}}, "video"),
        (f"/v1/videos/{video['id']}/remix", {"json": {"prompt": "x"}}, "video_id"),
    ]
    for path, sent, param in cases:
        found = error(server.post(path, **sent), 400)
        assert (found["code"], found["param"]) == ("unsupported_by_model", param)
    assert len(server.engine.seen) == before


def test_a_model_that_needs_a_picture_says_so(deploy):
    server = deploy(card=video_card(tasks=("I2V",), max_input_images=1))
    found = error(server.post("/v1/videos", json={"prompt": "x"}), 400)
    assert (found["code"], found["param"]) == ("missing_required_parameter", "input_reference")
    answer = server.post("/v1/videos", data={"prompt": "x", "num_frames": "5"}, files={"input_reference": png()})
    assert finished(server, answer.json()["id"])["status"] == "completed"


def test_a_model_of_pictures_makes_no_clips(deploy):
    server = deploy(card=image_card())
    found = error(server.post("/v1/videos", json={"prompt": "x"}), 400)
    assert (found["code"], found["param"]) == ("unsupported_by_model", "model")


def test_a_model_of_clips_makes_pictures(server):
    answer = server.post("/v1/images/generations", json={"prompt": "a cat", "size": "64x48", "n": 2})
    items = answer.json()["data"]
    assert len(items) == 2
    with Image.open(io.BytesIO(base64.b64decode(items[0]["b64_json"]))) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 48))


# --- the SDK ------------------------------------------------------------------------------------------------------


def test_the_sdk_creates_polls_and_downloads(server, client, tmp_path):
    video = client.videos.create_and_poll(prompt="a cat", size="720x1280", seconds="1", poll_interval_ms=20)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.size, video.seconds) == ("720x1280", "1.06")
    client.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
    assert frames_of((tmp_path / "clip.mp4").read_bytes()).shape == (17, 1280, 720, 3)
    with client.videos.with_streaming_response.download_content(video.id) as answer:
        answer.stream_to_file(tmp_path / "streamed.mp4")
    assert (tmp_path / "streamed.mp4").read_bytes() == (tmp_path / "clip.mp4").read_bytes()
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert thumbnail[8:12] == b"WEBP"
    assert client.videos.with_raw_response.retrieve(video.id).parse().id == video.id


def test_the_sdk_is_strict_about_a_size_it_knows(server):
    client = server.client()
    video = client.videos.create(prompt="a cat", size="1280x720", seconds="4", extra_body={"num_frames": 65, "seed": 3})
    assert video.status == "queued"
    assert client.videos.retrieve(video.id).id == video.id
    assert client.videos.delete(video.id).deleted


def test_the_sdk_remixes_edits_extends_and_begins_with_a_picture(client, tmp_path):
    original = client.videos.create_and_poll(
        prompt="a cat", extra_body={"num_frames": 5}, input_reference=("a.png", png(), "image/png"), poll_interval_ms=20
    )
    assert original.status == "completed", original.error
    remixed = client.videos.remix(original.id, prompt="a dog", extra_body={"seed": 1})
    assert client.videos.poll(remixed.id, poll_interval_ms=20).remixed_from_video_id == original.id
    data = client.videos.download_content(original.id).read()
    edited = client.videos.edit(prompt="a dog", video=data)
    assert client.videos.poll(edited.id, poll_interval_ms=20).status == "completed"
    (tmp_path / "v.mp4").write_bytes(data)
    extended = client.videos.extend(prompt="a dog", seconds="1", video=tmp_path / "v.mp4")
    assert client.videos.poll(extended.id, poll_interval_ms=20).num_frames == 21


def test_a_failed_clip_is_returned_and_not_raised(client):
    video = client.videos.create_and_poll(prompt="fail:timeout", poll_interval_ms=20)
    assert (video.status, video.error.code) == ("failed", "timeout")


def test_polling_goes_by_the_servers_header(client):
    assert client.videos.create_and_poll(prompt="a cat", extra_body={"num_frames": 5}).status == "completed"


def test_errors_of_the_sdk_name_the_parameter(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.videos.create(prompt="a cat", seconds="100")
    assert refusal.value.param == "seconds"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.videos.retrieve("video_unknown")
    assert unknown.value.code == "video_not_found"


def test_the_async_sdk_does_the_same(server, tmp_path):
    async def work():
        async with server.async_client(_strict_response_validation=False) as client:
            video = await client.videos.create_and_poll(
                prompt="a cat", extra_body={"num_frames": 5}, poll_interval_ms=20
            )
            assert video.status == "completed"
            (await client.videos.download_content(video.id)).write_to_file(tmp_path / "clip.mp4")
            async with client.videos.with_streaming_response.download_content(video.id) as answer:
                await answer.stream_to_file(tmp_path / "streamed.mp4")
            found = [one.id async for one in client.videos.list(limit=1, order="desc")]
            assert found[0] == video.id
            assert (await client.videos.remix(video.id, prompt="a dog")).remixed_from_video_id == video.id
            assert (await client.videos.delete(video.id)).deleted
            return video.id

    video_id = asyncio.run(work())
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "streamed.mp4").read_bytes()
    assert server.get(f"/v1/videos/{video_id}").status_code == 404


def test_spellings_without_v1_and_azures_do_the_same(server):
    for path in ("/videos", "/openai/videos", "/openai/v1/videos", "/v1/videos/"):
        answer = server.post(f"{path}?api-version=preview", json={"prompt": "a cat", "num_frames": 5})
        assert answer.status_code == 200, path
    assert server.get(f"/videos/{answer.json()['id']}").status_code == 200


def test_the_description_of_the_api_has_every_field(server):
    described = server.get("/openapi.json").json()
    fields = described["components"]["schemas"]["VideoRequest"]["properties"]
    assert {"prompt", "seconds", "fps", "num_frames", "input_reference", "reference_url", "output-quality"} <= set(
        fields
    )
    assert set(described["components"]["schemas"]["Video"]["properties"]) == FIELDS
    assert {"get", "post"} == set(described["paths"]["/v1/videos"])


def test_a_spooled_copy_is_closed(server):
    """Many edits leave no open files behind."""
    import psutil

    original = made(server)
    server.post("/v1/videos/edits", json={"prompt": "x", "video": {"id": original["id"]}})
    before = psutil.Process().num_fds()
    for _ in range(10):
        answer = server.post("/v1/videos/edits", json={"prompt": "x", "video": {"id": original["id"]}})
        finished(server, answer.json()["id"])
        server.post("/v1/videos/edits", data={"prompt": "x"}, files={"video": b"nothing"})
    wait_until(lambda: psutil.Process().num_fds() <= before + 5)


# --- keys and webhooks --------------------------------------------------------------------------------------------


def test_a_repeated_key_gives_the_same_clip_and_another_body_is_refused(server):
    headers = {"Idempotency-Key": "clip-1"}
    body = {"prompt": "a cat", "num_frames": 5}
    first = server.post("/v1/videos", json=body, headers=headers).json()
    again = server.post("/v1/videos", json=body, headers=headers).json()
    assert (again["id"], again["seed"]) == (first["id"], first["seed"])
    other = server.post("/v1/videos", json={**body, "prompt": "a dog"}, headers=headers)
    assert error(other, 409)["code"] == "idempotency_conflict"
    assert other.headers["x-should-retry"] == "false"
    for _ in range(2):
        answer = server.post(
            "/v1/videos", data=body, files={"input_reference": png()}, headers={"Idempotency-Key": "2"}
        )
        assert answer.status_code == 200, answer.text
    finished(server, answer.json()["id"])
    inputs = Path(server.config.data_dir) / "inputs"
    wait_until(lambda: list(inputs.iterdir()) == [])


def test_a_request_may_name_who_is_told_of_its_end(deploy):
    with receiver() as hook:
        server = deploy(card=video_card(), allow_url_host=(f"127.0.0.1:{hook.port}",))
        video = create(server, webhook_url=hook.url)
        wait_until(lambda: bool(hook.heard))
    told = json.loads(hook.heard[0][0])
    assert (told["type"], told["data"]["id"]) == ("video.completed", video["id"])


def test_a_webhook_that_would_never_be_told_is_refused_before_any_work(server):
    for odd in ("ftp://example.com", "example.com", "javascript:1", "http://10.0.0.1/", "https://example.com:22/"):
        answer = server.post("/v1/videos", json={"prompt": "a cat", "webhook_url": odd})
        assert error(answer, 400)["param"] == "webhook_url"
