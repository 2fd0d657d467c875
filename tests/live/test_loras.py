"""LoRA as a user of SGLang Diffusion's API page meets it, and as many users at once do, with the built-in model.

The examples are the page's own; only the address and the folder of the made-up absolute paths differ.
"""

import base64
import io
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from lora_files import demo_lora
from photogram.media.provenance import read_provenance
from running import serve

SET_ONE = r"""
curl -X POST http://localhost:30010/v1/set_lora \
-H "Content-Type: application/json" \
-d '{
"lora_nickname": "lora_name",
"lora_path": "/path/to/lora.safetensors",
"target": "all",
"strength": 0.8
}'
"""

SET_SEVERAL = r"""
curl -X POST http://localhost:30010/v1/set_lora \
-H "Content-Type: application/json" \
-d '{
"lora_nickname": ["lora_1", "lora_2"],
"lora_path": ["/path/to/lora1.safetensors", "/path/to/lora2.safetensors"],
"target": ["transformer", "transformer_2"],
"strength": [0.8, 1.0]
}'
"""

SET_SAME_TARGET = r"""
curl -X POST http://localhost:30010/v1/set_lora \
-H "Content-Type: application/json" \
-d '{
"lora_nickname": ["style_lora", "character_lora"],
"lora_path": ["/path/to/style.safetensors", "/path/to/character.safetensors"],
"target": "all",
"strength": [0.7, 0.9]
}'
"""

MERGE = r"""
curl -X POST http://localhost:30010/v1/merge_lora_weights \
-H "Content-Type: application/json" \
-d '{"strength": 0.8}'
"""

UNMERGE = r"""
curl -X POST http://localhost:30010/v1/unmerge_lora_weights \
-H "Content-Type: application/json"
"""

LIST = 'curl -sS -X GET "http://localhost:30010/v1/list_loras"'

SWITCH_TO_A = r"""
curl -X POST http://localhost:30010/v1/set_lora -d '{"lora_nickname": "lora_a", "lora_path": "path/to/A"}'
"""
SWITCH_OFF = "curl -X POST http://localhost:30010/v1/unmerge_lora_weights"
SWITCH_TO_B = r"""
curl -X POST http://localhost:30010/v1/set_lora -d '{"lora_nickname": "lora_b", "lora_path": "path/to/B"}'
"""

FILES = ("lora", "lora1", "lora2", "style", "character", "A", "B")
NAMES = ("A", "B", "style", "character")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with LoRAs of different ranks under path/to."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "path/to").mkdir(parents=True)
    for number, name in enumerate(FILES):
        demo_lora(folder / f"path/to/{name}.safetensors", seed=number, rank=2 + number)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = serve(tmp_path_factory.mktemp("served"), ["--lora-dir", str(folder)])
    yield server
    server.stop()


@pytest.fixture
def run(server, folder):
    """Run an example in a shell; the answer as JSON."""

    def run(script: str) -> dict:
        script = script.replace("http://localhost:30010", server.url).replace('"/path/to', f'"{folder}/path/to')
        command = ["bash", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"no_proxy": "*"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield run
    assert httpx.post(f"{server.url}/v1/unmerge_lora_weights").status_code == 200


def draw(server, **fields) -> bytes:
    """The file of one prompt and seed, made apart from all others unless `fields` say otherwise."""
    body = {"prompt": "a red house under a yellow star", "seed": 3, "size": "128x128", "deterministic": True} | fields
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_set_list_unmerge_and_merge_as_documented(run, server, folder):
    base = draw(server)
    assert run(SET_ONE)["status"] == "ok"
    listed = run(LIST)
    path = str(folder / "path/to/lora.safetensors")
    assert {"nickname": "lora_name", "path": path} in listed["loaded_adapters"]
    (entry,) = listed["active"]["transformer"]
    assert (entry["nickname"], entry["path"], entry["merged"], entry["strength"]) == ("lora_name", path, True, 0.8)
    assert entry["num_lora_layers_with_weights"] > 10
    changed = draw(server)
    assert np.abs(pixels(changed) - pixels(base)).mean() > 1
    run(UNMERGE)
    assert draw(server) == base
    run(MERGE)
    assert draw(server) == changed


def test_several_loras_as_documented(run, server):
    base = draw(server)
    answer = run(SET_SEVERAL)
    # The built-in model has one transformer.
    assert "'lora_2' is applied nowhere" in answer["message"]
    assert [one["nickname"] for one in run(LIST)["active"]["transformer"]] == ["lora_1"]
    assert draw(server) != base
    run(SET_SAME_TARGET)
    both = [(one["nickname"], one["strength"]) for one in run(LIST)["active"]["transformer"]]
    assert both == [("style_lora", 0.7), ("character_lora", 0.9)]
    used = read_provenance(draw(server)).loras
    assert [(one.nickname, one.strength) for one in used] == both


def test_switching_as_documented(run, server):
    base = draw(server)
    run(SWITCH_TO_A)
    first = draw(server)
    run(SWITCH_OFF)
    assert draw(server) == base
    run(SWITCH_TO_B)
    second = draw(server)
    assert len({base, first, second}) == 3
    # What the page asks for is not needed, and a known nickname needs no path.
    run(SWITCH_TO_A.replace(', "lora_path": "path/to/A"', ""))
    assert draw(server) == first


def test_a_lora_of_a_request_is_that_of_a_set(run, server):
    run(SWITCH_TO_A)
    merged = draw(server)
    run(SWITCH_OFF)
    own = draw(server, loras=[{"path": "path/to/A"}])
    assert pixels(own).tolist() == pixels(merged).tolist()
    assert draw(server, model="demo-image:path/to/A") == draw(server, loras=["path/to/A"])


def test_a_worker_that_takes_anothers_place_has_the_active_set(run, server):
    run(SWITCH_TO_A)
    before = draw(server)
    os.kill(server.worker_pid(), signal.SIGKILL)
    assert draw(server) == before
    assert run(LIST)["active"]["transformer"][0]["nickname"] == "lora_a"


def test_strength_grades_the_effect(server):
    base = pixels(draw(server))
    changes = [
        np.abs(pixels(draw(server, loras=[{"path": "path/to/A", "strength": s}])) - base).mean() for s in (0, 0.2, 0.6)
    ]
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]


def test_eight_clients_with_four_loras_at_once_each_get_their_own_picture(server):
    def ask(number: int, **fields) -> bytes:
        return draw(server, seed=number, loras=[{"path": f"path/to/{NAMES[number % 4]}"}], **fields)

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
        shared = list(pool.map(lambda number: ask(number, deterministic=False), range(8)))
    assert together == alone
    others = [draw(server, seed=number, loras=[{"path": f"path/to/{NAMES[(number + 1) % 4]}"}]) for number in range(8)]
    for one, same, other in zip(alone, shared, others, strict=True):
        own = np.abs(pixels(same) - pixels(one)).mean()
        # Sharing passes changes rounding; another LoRA changes the picture.
        assert own < 1 < np.abs(pixels(other) - pixels(one)).mean()


def test_a_set_while_pictures_are_drawn_reaches_none_of_them(run, server):
    base = draw(server, num_inference_steps=20)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(draw, server, num_inference_steps=20) for _ in range(4)]
        while json.loads(httpx.get(f"{server.url}/server_info").text)["num_jobs"] < 4:
            assert not all(one.done() for one in running), "the pictures were too fast to be overtaken"
        run(SWITCH_TO_A)
        assert [one.result() == base for one in running] == [True] * 4
    assert draw(server, num_inference_steps=20) != base


def test_the_built_in_model_has_two_loras_of_its_own(live_server):
    listed = [model.id for model in live_server.client().models.list()]
    assert {"demo-image", "demo-image:pastel", "demo-image:sketch"} <= set(listed)
    base, pastel, more = (
        pixels(draw(live_server, size="256x256", loras=[{"nickname": "pastel", "strength": strength}]))
        for strength in (0, 0.5, 1)
    )

    def vividness(picture: np.ndarray) -> float:
        return float((picture.max(axis=2) - picture.min(axis=2)).mean())

    assert vividness(base) > vividness(pastel) * 1.15 > vividness(more) * 1.3
    drawn = draw(live_server, model="demo-image:sketch", size="256x256")
    assert np.abs(pixels(drawn) - base).mean() > 5
    assert [one.nickname for one in read_provenance(drawn).loras] == ["sketch"]
