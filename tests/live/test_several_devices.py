"""One model on several devices, as the command line of the API's documentation starts it; on a CPU, four processes."""

import base64
import io
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from running import Running, serve

FLAGS = ["--text-encoder-cpu-offload", "--pin-cpu-memory", "--num-gpus", "4", "--ulysses-degree=2", "--ring-degree=2"]
PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> Iterator[Running]:
    server = serve(tmp_path_factory.mktemp("ranks"), FLAGS)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory) -> Iterator[Running]:
    server = serve(tmp_path_factory.mktemp("replicas"), ["--num-gpus", "2", "--dp-size", "2"])
    yield server
    server.stop()


def picture(server: Running, **fields) -> np.ndarray:
    body = {"prompt": PROMPT, "seed": 5, "size": "256x160"} | fields
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def followers(server: Running) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "photogram.worker.parallel.follower" in process.cmdline()
    ]


def test_four_ranks_draw_what_one_draws(four_ranks, live_server):
    assert httpx.get(f"{four_ranks.url}/models").json()["num_gpus"] == 4
    assert np.abs(picture(four_ranks) - picture(live_server)).max() <= 2  # of 255


def test_four_ranks_decode_a_large_picture_as_one_does(four_ranks, live_server):
    size = "512x128"  # 64 columns of latents: a band of 16 for each rank
    assert np.abs(picture(four_ranks, size=size) - picture(live_server, size=size)).max() <= 2  # of 255


@pytest.mark.long
def test_two_ranks_that_share_guidance_draw_what_one_draws(tmp_path, clip_model, clip_server):
    server = serve(tmp_path, ["--model-path", str(clip_model), "--num-gpus", "2", "--enable-cfg-parallel"])
    guided = {"size": "64x64", "num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": "pale"}
    try:
        assert len(followers(server)) == 1
        assert np.abs(picture(server, **guided) - picture(clip_server, **guided)).max() <= 2  # of 255
    finally:
        server.stop()


def test_a_failed_call_fails_its_own_request_on_all_ranks_alike(four_ranks):
    body = {"prompt": PROMPT, "size": "256x160", "num_inference_steps": 10_000}
    assert httpx.post(f"{four_ranks.url}/v1/images/generations", json=body).status_code == 400
    assert len(followers(four_ranks)) == 3
    picture(four_ranks)


def test_two_replicas_draw_at_the_same_time_what_one_worker_draws_and_either_may_be_killed(two_replicas, live_server):
    assert httpx.get(f"{two_replicas.url}/models").json()["num_gpus"] == 2
    assert httpx.get(f"{two_replicas.url}/server_info").json()["dp_size"] == 2
    expected = picture(live_server)
    with ThreadPoolExecutor(4) as clients:
        for drawn in clients.map(lambda _: picture(two_replicas), range(4)):
            assert np.abs(drawn - expected).max() <= 2  # of 255
    os.kill(two_replicas.worker_pid(), signal.SIGKILL)
    assert np.abs(picture(two_replicas) - expected).max() <= 2
    assert two_replicas.status()["state"] == "ready"


@pytest.mark.long
def test_any_rank_may_be_killed_and_the_picture_still_comes(four_ranks):
    expected = picture(four_ranks)
    for rank in range(4):
        members = followers(four_ranks)
        victim = four_ranks.worker_pid() if rank == 0 else members[rank - 1].pid
        os.kill(victim, signal.SIGKILL)
        assert np.abs(picture(four_ranks) - expected).max() <= 2
        assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


@pytest.mark.long
def test_a_rank_that_dies_in_the_middle_of_a_picture_does_not_cost_it(four_ranks):
    expected = picture(four_ranks, num_inference_steps=12)
    with httpx.stream(
        "POST",
        f"{four_ranks.url}/v1/images/generations",
        json={"prompt": PROMPT, "seed": 5, "size": "256x160", "num_inference_steps": 12,
              "stream": True, "stream_progress": True},
        timeout=300,
    ) as stream:  # fmt: skip
        killed = False
        data = ""
        for line in stream.iter_lines():
            if '"step":3' in line and not killed:
                followers(four_ranks)[1].kill()
                killed = True
            data = line.removeprefix("data: ") if line.startswith("data: ") else data
    assert killed
    completed = json.loads(data)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(completed["b64_json"]))).convert("RGB")).astype(int)
    assert np.abs(drawn - expected).max() <= 2
