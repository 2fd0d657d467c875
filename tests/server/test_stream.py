"""Server-sent events: their shapes, their order, and what happens when either side breaks off."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket

import numpy as np
import openai
import pytest
from PIL import Image

from .conftest import wait_until

URL = "/v1/images/generations"


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))), dtype=float)


def raw_events(server, **body) -> list[tuple[str, dict]]:
    answer = server.post(json={"prompt": "a cube", "stream": True, **body})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\n")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_sdk_gets_partial_pictures_and_then_the_picture(server, partial_images):
    stream = server.client().images.generate(
        prompt="a red cube", stream=True, partial_images=partial_images, size="64x64", extra_body={"seed": 3}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * partial_images + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(partial_images))
    assert events[-1].usage.input_tokens == 3
    for event in events:
        assert (event.size, event.output_format, event.quality, event.background) == ("64x64", "png", "auto", "opaque")
        assert pixels(event.b64_json).shape == (64, 64, 3)
    distances = [np.abs(pixels(event.b64_json) - pixels(events[-1].b64_json)).mean() for event in events[:-1]]
    assert distances == sorted(distances, reverse=True)
    plain = server.client().images.generate(prompt="a red cube", size="64x64", extra_body={"seed": 3})
    assert plain.data[0].b64_json == events[-1].b64_json


def test_async_sdk_streams(server):
    async def ask():
        async with server.async_client() as client:
            stream = await client.images.generate(prompt="a cube", stream=True, partial_images=1)
            return [event.type async for event in stream]

    assert asyncio.run(ask()) == ["image_generation.partial_image", "image_generation.completed"]


def test_each_of_n_pictures_is_completed_once(server):
    events = raw_events(server, n=2, partial_images=1, seed=5)
    completed = [data for name, data in events if name == "image_generation.completed"]
    assert sorted(data["index"] for data in completed) == [0, 1]
    assert {data["index"]: data["seed"] for data in completed} == {0: 5, 1: 6}
    partial = [data for name, data in events if name == "image_generation.partial_image"]
    assert sorted((data["index"], data["partial_image_index"]) for data in partial) == [(0, 0), (1, 0)]
    for data in completed:
        content = server.get(f"/v1/images/{data['id']}/content").content
        assert base64.b64decode(data["b64_json"]) == content


def test_nothing_but_openais_events_is_sent_unless_asked_for(server):
    assert {name for name, _ in raw_events(server, partial_images=3)} == {
        "image_generation.partial_image",
        "image_generation.completed",
    }
    events = raw_events(server, stream_progress=True)
    steps = [data for name, data in events if name == "photogram.progress"]
    assert [data["step"] for data in steps] == [0, 1, 2, 3, 4]
    assert [data["fraction"] for data in steps] == sorted(data["fraction"] for data in steps)
    assert events[-1][0] == "image_generation.completed"


def test_event_names_and_types_agree(server):
    assert all(name == data["type"] for name, data in raw_events(server, partial_images=2, stream_progress=True))


def test_quality_is_echoed_and_url_is_ignored_by_name_on_a_stream(server):
    answer = server.post(json={"prompt": "x", "stream": "true", "quality": "high", "response_format": "url"})
    assert answer.headers["x-photogram-ignored"] == "response_format"
    assert '"quality":"high"' in answer.text


def test_mistake_before_the_first_byte_is_an_ordinary_error(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().images.generate(prompt="a cube", stream=True, partial_images=9)
    assert caught.value.param == "partial_images"


def test_failure_after_the_start_is_an_error_event(deploy):
    server = deploy()
    stream = server.client().images.generate(prompt="fail:out_of_memory", stream=True, partial_images=1)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "out_of_memory"
    assert "no luck today" in caught.value.message
    name, data = raw_events(server, prompt="fail:out_of_memory")[-1]
    assert name == "error"
    assert set(data["error"]) == {"message", "type", "param", "code"}


def test_warnings_travel_with_the_picture(server):
    _, data = raw_events(server, prompt="warn me")[-1]
    assert data["warnings"] == ["The prompt was cut at 77 tokens."]


def test_silence_is_filled_with_comments(deploy, monkeypatch):
    from photogram.server import events

    monkeypatch.setattr(events.EventStream.__init__, "__defaults__", (0.05,))
    server = deploy()
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as client:
        send_request(client, b'{"prompt": "hold", "stream": true}')
        received = b""
        while received.count(b": keepalive\n\n") < 3:
            received += client.recv(1000)
        server.engine.released.set()
        while b"image_generation.completed" not in received:
            received += client.recv(100_000)


def send_request(client: socket.socket, body: bytes) -> None:
    client.sendall(b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


def test_client_that_hangs_up_ends_its_jobs(deploy):
    server = deploy()
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as client:
        send_request(client, b'{"prompt": "hold", "stream": true, "n": 2, "partial_images": 1}')
        assert b"200" in client.recv(1000).split(b"\r\n")[0]
        wait_until(lambda: server.engine.num_running == 2)
    wait_until(lambda: [row[1] for row in server.rows()] == ["cancelled", "cancelled"])
    wait_until(lambda: server.leftover_frames() == [])


def test_sdk_that_closes_its_stream_ends_the_job(deploy):
    server = deploy()
    with server.client().images.generate(prompt="hold", stream=True, partial_images=1):
        wait_until(lambda: server.engine.num_running == 1)
    wait_until(lambda: server.engine.num_running == 0)
