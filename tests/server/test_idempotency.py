"""Requests that are sent again under an `Idempotency-Key`: one job, one answer."""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from .conftest import wait_until

KEY = {"Idempotency-Key": "order 1234"}


def test_a_repeated_request_gets_the_same_pictures_and_makes_none(deploy):
    server = deploy()
    first, again, through_v1 = (
        server.post(path, json={"prompt": "a cube", "n": 2, "size": "32x32"}, headers=KEY)
        for path in ("/v1/images/generations", "/v1/images/generations", "/images/generations")
    )
    assert first.status_code == again.status_code == 200
    assert first.json()["data"] == again.json()["data"] == through_v1.json()["data"]
    assert len(server.engine.seen) == 2
    assert first.json()["usage"] == again.json()["usage"]
    assert server.post(json={"prompt": "a cube", "n": 2, "size": "32x32"}).json()["data"] != first.json()["data"]


def test_the_same_key_with_another_body_is_409_and_not_to_be_retried(deploy):
    server = deploy()
    server.post(json={"prompt": "a cube"}, headers=KEY)
    answer = server.post(json={"prompt": "a ball"}, headers=KEY)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "idempotency_conflict"
    assert answer.headers["x-should-retry"] == "false"
    assert len(server.engine.seen) == 1


def test_keys_of_different_owners_have_nothing_to_do_with_each_other(deploy):
    server = deploy(api_key=("sk-ann", "sk-bob"))
    bodies = {"sk-ann": {"prompt": "a cube"}, "sk-bob": {"prompt": "a ball"}}
    for key, body in bodies.items():
        assert server.post(json=body, headers=KEY | {"authorization": f"Bearer {key}"}).status_code == 200
    assert len(server.engine.seen) == 2


def test_requests_that_come_at_once_wait_for_one_job(deploy):
    server = deploy()
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.post, json={"prompt": "hold"}, headers=KEY) for _ in range(6)]
        wait_until(lambda: len(server.engine.seen) == 1)
        server.engine.released.set()
        answers = [each.result() for each in asked]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["data"][0]["id"] for answer in answers}) == 1
    assert len(server.engine.seen) == 1


def test_after_a_timeout_the_same_request_gets_the_picture_that_was_begun(deploy):
    server = deploy()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "hold"}, headers=KEY, timeout=0.5)
    wait_until(lambda: server.rows()[0][1] == "running")
    server.engine.released.set()
    answer = server.post(json={"prompt": "hold"}, headers=KEY)
    assert answer.status_code == 200
    assert [row[0] for row in server.rows()] == [answer.json()["data"][0]["id"]]
    assert server.engine.cancelled == []


def test_without_a_key_a_picture_that_nobody_waits_for_is_not_made(deploy):
    server = deploy()
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "hold"}, timeout=0.5)
    wait_until(lambda: server.rows()[0][1] == "cancelled")


def test_a_failure_is_repeated_and_not_run_again(deploy):
    server = deploy()
    answers = [server.post(json={"prompt": "fail:out_of_memory"}, headers=KEY) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [507, 507]
    assert answers[0].json() == answers[1].json()
    assert len(server.engine.seen) == 1


def test_uploads_count_by_their_bytes_and_not_by_their_boundary(deploy):
    server = deploy()

    def edit(colour: str) -> httpx.Response:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(picture, "PNG")
        files = {"image": ("a.png", picture.getvalue(), "image/png")}
        return server.post("/v1/images/edits", data={"prompt": "greener"}, files=files, headers=KEY)

    first, again, other = edit("red"), edit("red"), edit("blue")
    assert first.status_code == again.status_code == 200
    assert first.json()["data"] == again.json()["data"]
    assert other.status_code == 409
    wait_until(lambda: not any((server.config.data_path / "inputs").iterdir()))


def test_a_stream_that_is_asked_for_again_ends_in_the_same_picture(deploy):
    server = deploy()
    body = {"prompt": "a cube", "stream": True, "partial_images": 1}
    streams = [server.post(json=body, headers=KEY).text for _ in range(2)]
    lasts = [[line for line in text.splitlines() if line.startswith("data:")][-1] for text in streams]
    pictures = [line.split('"b64_json":"')[1].split('"')[0] for line in lasts]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
def test_a_key_that_is_none_is_refused_by_name(deploy, key):
    answer = deploy().post(json={"prompt": "a cube"}, headers={"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_a_request_that_was_interrupted_by_a_restart_is_finished_by_the_next_server(deploy):
    first = deploy()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{first.url}/v1/images/generations", json={"prompt": "hold"}, headers=KEY, timeout=0.5)
    wait_until(lambda: first.rows()[0][1] == "running")
    # Ends without waiting for what runs.
    first.loop.call_soon_threadsafe(first.task.cancel)
    first._thread.join(20)
    assert first.rows()[0][1] == "queued"
    second = deploy()
    second.engine.released.set()
    answer = second.post(json={"prompt": "hold"}, headers=KEY)
    assert answer.status_code == 200
    assert [row[:2] for row in second.rows()] == [(answer.json()["data"][0]["id"], "completed")]
