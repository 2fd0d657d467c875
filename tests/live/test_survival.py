"""What a client sees when the worker dies, hangs, or runs out of memory. A real server with a tiny FLUX.2."""

import base64
import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from PIL import Image

from running import Running, serve


@pytest.fixture(scope="module")
def server(family_folder, tmp_path_factory):
    flags = ["--model-path", str(family_folder("flux-2-klein")), "--hang-timeout-s", "5", "--no-warmup"]
    flags += ["--worker-memory-gb", "0.1"]
    running = serve(tmp_path_factory.mktemp("survival"), flags)
    yield running
    running.stop()


def draw(server: Running, *, size: str = "64x64", steps: int = 4, retries: int = 0, **extra) -> Image.Image:
    answer = server.client(max_retries=retries).images.generate(
        prompt="a red circle", size=size, extra_body={"num_inference_steps": steps, "seed": 3} | extra
    )
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def in_background(function, *args, **kwargs):
    return ThreadPoolExecutor(1).submit(function, *args, **kwargs)


def wait_until_drawing(server: Running) -> None:
    """Until the worker is in the middle of a job: its process is burning CPU."""
    worker = psutil.Process(server.worker_pid())
    before = worker.cpu_times().user
    while worker.cpu_times().user < before + 0.3:
        time.sleep(0.02)


def test_worker_killed_in_mid_generation_ends_in_the_same_picture(server):
    expected = draw(server, steps=150)
    job = in_background(draw, server, steps=150)
    time.sleep(0.2)
    wait_until_drawing(server)
    os.kill(server.worker_pid(), signal.SIGKILL)
    picture = job.result(timeout=240)
    assert picture.tobytes() == expected.tobytes()
    assert server.status()["num_restarts"] >= 1


def test_ready_tells_the_truth_while_the_worker_is_replaced(server):
    assert httpx.get(f"{server.url}/ready").status_code == 200
    os.kill(server.worker_pid(), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while httpx.get(f"{server.url}/ready").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.wait_ready()
    assert draw(server).size == (64, 64)


@pytest.mark.long
def test_hung_worker_is_replaced_and_the_job_is_drawn(server):
    server.wait_ready()
    job = in_background(draw, server, steps=150)
    time.sleep(0.2)
    wait_until_drawing(server)
    hung = server.worker_pid()
    os.kill(hung, signal.SIGSTOP)
    assert job.result(timeout=240).size == (64, 64)
    assert server.worker_pid() != hung


@pytest.mark.long
def test_job_whose_worker_dies_twice_fails_with_a_reason(server):
    server.wait_ready()
    ended = threading.Event()

    def killing() -> None:
        while not ended.is_set():
            server.wait_ready()
            if not ended.is_set():
                time.sleep(0.5)
                os.kill(server.worker_pid(), signal.SIGKILL)

    job = in_background(draw, server, size="256x256", steps=200)
    killer = threading.Thread(target=killing)
    killer.start()
    try:
        with pytest.raises(openai.InternalServerError) as raised:
            job.result(timeout=400)
    finally:
        ended.set()
        killer.join()
    assert raised.value.status_code == 503
    assert raised.value.code == "engine_unavailable"
    server.wait_ready()
    assert draw(server).size == (64, 64)


def test_out_of_memory_is_a_507_and_the_next_request_succeeds(server):
    server.wait_ready()
    before = server.worker_pid()
    with pytest.raises(openai.InternalServerError) as raised:
        draw(server, size="1024x1024", steps=2)
    assert raised.value.status_code == 507
    assert raised.value.code == "out_of_memory"
    assert "smaller size" in raised.value.message
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert draw(server).size == (64, 64)
    assert server.worker_pid() == before


def test_client_that_leaves_frees_the_worker(server):
    server.wait_ready()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/images/generations",
            json={"prompt": "x", "size": "256x256", "num_inference_steps": 200},
            timeout=1,
        )
    assert draw(server).size == (64, 64)
    deadline = time.monotonic() + 60
    worker = psutil.Process(server.worker_pid())
    while worker.cpu_percent(0.5) > 20:
        assert time.monotonic() < deadline, "the worker goes on drawing for nobody"
