"""The LoRA endpoints over HTTP, and the LoRAs of single requests."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from lora_files import safetensors
from photogram.core.errors import ConfigError
from photogram.jobs.record import JobRecord
from photogram.jobs.store import open_store
from photogram.media.provenance import read_provenance

from .conftest import Deployment, wait_until
from .fake_engine import image_card

TWO = image_card(lora_modules=("transformer", "transformer_2"))


def lora(path: Path, *modules: str, layers: int = 2) -> str:
    """Write a LoRA with layers of these modules."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module in modules or ("transformer",):
        for layer in range(layers):
            tensors[f"{module}.{layer}.lora_A.weight"] = np.ones((2, 4), "float32")
            tensors[f"{module}.{layer}.lora_B.weight"] = np.ones((4, 2), "float32")
    path.write_bytes(safetensors(tensors))
    return str(path)


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    return {name: lora(tmp_path / f"weights/{name}.safetensors") for name in ("a", "b", "c")}


def set_lora(server: Deployment, **body) -> httpx.Response:
    return server.post("/v1/set_lora", json=body)


def active(server: Deployment) -> dict[str, list[tuple[str, float, bool]]]:
    listed = server.get("/v1/list_loras").json()["active"]
    return {
        module: [(one["nickname"], one["strength"], one["merged"]) for one in entries]
        for module, entries in listed.items()
    }


def drawn_with(server: Deployment, answer: httpx.Response) -> list[tuple[str, float, str]]:
    """The LoRAs that the engine was given for a picture, once its answer is checked to say the same."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    uses = server.engine.seen[body["data"][0]["id"]].loras
    told = [(one["nickname"], one["strength"], one.get("target", "all")) for one in body.get("loras", [])]
    assert told == [(use.nickname, use.strength, use.target) for use in uses]
    return told


def draw(server: Deployment, **body) -> list[tuple[str, float, str]]:
    return drawn_with(server, server.post(json={"prompt": "a cube", **body}))


# --- the four endpoints -------------------------------------------------------------------------------------------


def test_set_merge_unmerge_and_list(deploy, paths):
    server = deploy()
    assert server.get("/v1/list_loras").json() == {"loaded_adapters": [], "active": {}, "applied_nowhere": []}
    answer = set_lora(server, lora_nickname="a", lora_path=paths["a"], target="all", strength=0.8)
    assert answer.json() == {
        "status": "ok",
        "message": "Successfully set LoRA adapter(s): a (target: all, strength: 0.80)",
    }
    assert server.get("/v1/list_loras").json() == {
        "loaded_adapters": [{"nickname": "a", "path": paths["a"]}],
        "active": {
            "transformer": [
                {
                    "nickname": "a",
                    "path": paths["a"],
                    "merged": True,
                    "strength": 0.8,
                    "num_lora_layers_with_weights": 2,
                    "mode": "merged",
                }
            ]
        },
        "applied_nowhere": [],
    }
    assert draw(server) == [("a", 0.8, "all")]
    answer = server.post("/v1/unmerge_lora_weights", headers={"content-type": "application/json"})
    assert answer.json()["message"] == "Successfully unmerged LoRA weights (target: all)"
    assert active(server) == {"transformer": [("a", 0.8, False)]}
    assert draw(server) == []
    answer = server.post("/v1/merge_lora_weights", json={"strength": 0.5})
    assert answer.json()["message"] == "Successfully merged LoRA weights (target: all, strength: 0.5)"
    assert active(server) == {"transformer": [("a", 0.5, True)]}
    assert server.post("/merge_lora_weights").status_code == 200
    assert active(server) == {"transformer": [("a", 1.0, True)]}


def test_every_spelling_of_a_body_is_read(deploy, paths):
    server = deploy()
    body = {"lora_nickname": "a", "lora_path": paths["a"], "strength": "0.5"}
    form = "application/x-www-form-urlencoded"
    lists = {"lora_nickname[]": ["a"], "lora_path[]": [paths["a"]], "strength": "0.5"}
    for options in (
        {"json": body},
        {"content": json.dumps(body)},
        {"content": json.dumps(body), "headers": {"content-type": form}},
        {"data": body},
        {"data": lists},
        {"files": {name: (None, value) for name, value in body.items()}},
        {"json": {"lora_nickname": "a"}, "params": {"strength": "0.5"}},
    ):
        answer = server.post("/set_lora/", **options)
        assert answer.status_code == 200, answer.text
        assert active(server) == {"transformer": [("a", 0.5, True)]}
        assert server.post("/v1/unmerge_lora_weights").status_code == 200


def test_lists_are_merged_in_their_order_and_single_values_are_spread(deploy, paths):
    server = deploy()
    both = {"lora_nickname": ["a", "b"], "lora_path": [paths["a"], paths["b"]], "target": "all"}
    answer = set_lora(server, **both, strength=[0.7, 0.9])
    assert answer.json()["message"].endswith("adapter(s): a, b (target: all, strength: 0.70, 0.90)")
    assert draw(server) == [("a", 0.7, "all"), ("b", 0.9, "all")]
    set_lora(server, lora_nickname=["b", "a"], strength=-0.5)
    assert draw(server) == [("b", -0.5, "all"), ("a", -0.5, "all")]
    set_lora(server, lora_nickname=["b", "c"], lora_path=[None, paths["c"]])
    assert draw(server) == [("b", 1.0, "all"), ("c", 1.0, "all")]


def test_two_transformers_have_their_own(deploy, paths):
    server = deploy(card=TWO)
    paths = [lora(Path(paths[name]), "transformer", "transformer_2") for name in ("a", "b")]
    set_lora(
        server,
        lora_nickname=["a", "b"],
        lora_path=paths,
        target=["transformer", "transformer_2"],
        strength=[0.8, 1.0],
    )
    assert active(server) == {"transformer": [("a", 0.8, True)], "transformer_2": [("b", 1.0, True)]}
    assert draw(server) == [("a", 0.8, "transformer"), ("b", 1.0, "transformer_2")]
    server.post("/v1/unmerge_lora_weights", json={"target": "transformer"})
    assert draw(server) == [("b", 1.0, "transformer_2")]


def test_a_target_that_the_model_lacks_is_told(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    answer = set_lora(server, lora_nickname="b", lora_path=paths["b"], target="transformer_2")
    assert answer.status_code == 200
    assert "'b' is applied nowhere" in answer.json()["message"]
    assert server.get("/v1/list_loras").json()["applied_nowhere"] == ["b"]
    assert draw(server) == [("a", 1.0, "all")]


def test_switching_without_and_with_unmerging_first(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    set_lora(server, lora_nickname="b", lora_path=paths["b"])
    assert active(server) == {"transformer": [("b", 1.0, True)]}
    server.post("/v1/unmerge_lora_weights")
    server.post("/v1/unmerge_lora_weights")
    set_lora(server, lora_nickname="a")
    assert active(server) == {"transformer": [("a", 1.0, True)]}
    assert [one["nickname"] for one in server.get("/v1/list_loras").json()["loaded_adapters"]] == ["a", "b"]


def test_a_nickname_can_be_given_another_file(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    set_lora(server, lora_nickname="a", lora_path=paths["b"])
    assert server.get("/v1/list_loras").json()["loaded_adapters"] == [{"nickname": "a", "path": paths["b"]}]


def test_each_set_has_the_worker_look_at_the_file_again(deploy, paths):
    server = deploy()
    for _ in range(2):
        set_lora(server, lora_nickname="a", lora_path=paths["a"])
    assert len([kind for kind, _ in server.engine.lora_calls if kind == "set"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "lora_nickname"),
        ({"lora_nickname": None}, 400, "lora_nickname"),
        ({"lora_nickname": ""}, 400, "lora_nickname"),
        ({"lora_nickname": []}, 400, "lora_nickname"),
        ({"lora_nickname": 7}, 400, "lora_nickname"),
        ({"lora_nickname": {"a": 1}}, 400, "lora_nickname"),
        ({"lora_nickname": [None]}, 400, "lora_nickname"),
        ({"lora_nickname": "x\ny"}, 400, "lora_nickname"),
        ({"lora_nickname": "x" * 300}, 400, "lora_nickname"),
        ({"lora_nickname": ["a"] * 17}, 400, "lora_nickname"),
        ({"lora_nickname": "nobody"}, 404, "lora_nickname"),
        ({"lora_nickname": ["a", "nobody"]}, 404, "lora_nickname"),
        ({"lora_nickname": "x", "lora_path": "A"}, 404, "lora_path"),
        ({"lora_nickname": "x", "lora_path": "/absent/x.safetensors"}, 404, "lora_path"),
        ({"lora_nickname": "x", "lora_path": "acme/unknown"}, 404, "lora_path"),
        ({"lora_nickname": "x", "lora_path": 7}, 400, "lora_path"),
        ({"lora_nickname": ["a", "x"], "lora_path": "A"}, 400, "lora_path"),
        ({"lora_nickname": ["a", "x"], "lora_path": ["A"]}, 400, "lora_path"),
        ({"lora_nickname": "a", "target": "foo"}, 400, "target"),
        ({"lora_nickname": "a", "target": 3}, 400, "target"),
        ({"lora_nickname": ["a", "b"], "target": ["all"]}, 400, "target"),
        ({"lora_nickname": "a", "strength": "strong"}, 400, "strength"),
        ({"lora_nickname": "a", "strength": 1e9}, 400, "strength"),
        ({"lora_nickname": "a", "strength": "nan"}, 400, "strength"),
        ({"lora_nickname": "a", "strength": True}, 400, "strength"),
        ({"lora_nickname": ["a", "b"], "strength": [1, 2, 3]}, 400, "strength"),
    ],
)
def test_every_mistake_names_its_parameter_and_changes_nothing(mistakes, body, status, param):
    server = mistakes
    before = server.get("/v1/list_loras").json()
    answer = set_lora(server, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert answer.json()["detail"] == error["message"]
    assert server.get("/v1/list_loras").json() == before
    assert draw(server) == [("a", 0.6, "all")]


@pytest.fixture(scope="module")
def mistakes(server, tmp_path_factory):
    """A server on which `a` is set, and `b` known."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("b", "a"):
        set_lora(server, lora_nickname=name, lora_path=lora(folder / f"{name}.safetensors"), strength=0.6)
    return server


@pytest.mark.parametrize("route", ["merge_lora_weights", "unmerge_lora_weights"])
def test_mistakes_of_merge_and_unmerge_are_errors_too(mistakes, route):
    for body, param in (({"target": "foo"}, "target"), ({"target": ["all"]}, "target")):
        answer = mistakes.post(f"/v1/{route}", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert mistakes.post("/v1/merge_lora_weights", json={"strength": "inf"}).json()["error"]["param"] == "strength"
    assert draw(mistakes) == [("a", 0.6, "all")]


def test_merging_what_was_never_set_is_an_error(deploy):
    server = deploy()
    answer = server.post("/v1/merge_lora_weights")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_lora_set")
    assert server.post("/v1/unmerge_lora_weights").status_code == 200


def test_files_that_are_no_lora_or_not_for_this_model_are_refused(deploy, tmp_path, paths):
    server = deploy()
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}.")
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    for path, reason in (
        (tmp_path / "pickle.safetensors", "a pickle"),
        (lora(tmp_path / "other.safetensors", "unet"), "not made for this model"),
        (tmp_path, "holds several files"),
    ):
        answer = set_lora(server, lora_nickname="x", lora_path=str(path))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "lora_path"
        assert reason in answer.json()["error"]["message"]
    assert draw(server) == [("a", 1.0, "all")]
    assert [one["nickname"] for one in server.get("/v1/list_loras").json()["loaded_adapters"]] == ["a"]


def test_unknown_fields_are_named(deploy, paths):
    server = deploy()
    answer = set_lora(server, lora_nickname="a", lora_path=paths["a"], merge_mode="dynamic", lora_alpha=4)
    assert answer.headers["x-photogram-ignored"] == "merge_mode, lora_alpha"


def test_a_pipeline_without_lora_says_so(deploy, paths):
    server = deploy(card=image_card(lora_modules=()))
    for answer in (
        set_lora(server, lora_nickname="a", lora_path=paths["a"]),
        server.post("/v1/merge_lora_weights"),
        server.post("/v1/unmerge_lora_weights"),
        server.get("/v1/list_loras"),
        server.post(json={"prompt": "a cube", "loras": [{"path": paths["a"]}]}),
    ):
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "lora_not_supported"
        assert answer.json()["detail"] == "LoRA is not enabled for this pipeline."
    assert draw(server) == draw(server, loras=[]) == []
    assert server.get("/models").json()["supports_lora"] is False


def test_keys_of_administrators(deploy, paths, tmp_path):
    def statuses(server: Deployment, key: str | None) -> set[int]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"lora_nickname": "a", "lora_path": paths["a"]}
        return {
            server.post("/v1/set_lora", json=body, headers=headers).status_code,
            server.post("/v1/merge_lora_weights", headers=headers).status_code,
            server.post("/v1/unmerge_lora_weights", headers=headers).status_code,
            server.get("/v1/list_loras", headers=headers).status_code,
        }

    assert statuses(deploy(), "sk-anything") == {200}
    server = deploy(api_key=("sk-user",), data_dir=str(tmp_path / "second"))
    assert [statuses(server, key) for key in (None, "sk-wrong", "sk-user")] == [{401}, {401}, {200}]
    server = deploy(api_key=("sk-user",), admin_api_key="sk-admin", data_dir=str(tmp_path / "third"))
    assert [statuses(server, key) for key in (None, "sk-wrong", "sk-user", "sk-admin")] == [{401}, {401}, {403}, {200}]


def test_concurrent_changes_come_one_after_the_other(deploy, paths):
    server = deploy()
    server.engine.lora_pause_s = 0.01
    for name in paths:
        set_lora(server, lora_nickname=name, lora_path=paths[name])

    def change(number: int) -> int:
        if number % 4 == 3:
            return server.post("/v1/unmerge_lora_weights").status_code
        return set_lora(server, lora_nickname="abc"[number % 4], strength=number / 10).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(24))) == {200}
    listed = active(server)["transformer"]
    assert len(listed) == 1
    # What the server says and what the worker has are one.
    assert (server.engine.merged, server.engine.active[0].nickname) == (listed[0][2], listed[0][0])
    assert server.engine.active[0].strength == listed[0][1]


# --- jobs and requests --------------------------------------------------------------------------------------------


def test_a_job_keeps_the_set_it_was_submitted_under(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, json={"prompt": "hold on"})
        wait_until(lambda: server.engine.num_running == 1)
        set_lora(server, lora_nickname="b", lora_path=paths["b"])
        server.engine.released.set()
        assert drawn_with(server, first.result()) == [("a", 1.0, "all")]
    assert draw(server) == [("b", 1.0, "all")]


def test_a_request_has_its_own_loras_in_place_of_the_active_set(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    assert draw(server, loras=[{"nickname": "a", "strength": 0.3}]) == [("a", 0.3, "all")]
    assert draw(server, loras=[{"path": paths["b"], "strength": -0.5, "target": "transformer"}, "a"]) == [
        ("b", -0.5, "transformer"),
        ("a", 1.0, "all"),
    ]
    assert draw(server, loras=[{"path": paths["c"], "nickname": "mine", "scale": 2}]) == [("mine", 2.0, "all")]
    assert draw(server, loras=[]) == []
    assert draw(server) == [("a", 1.0, "all")]
    # A request's own nickname is not known to others.
    assert server.post(json={"prompt": "a cube", "loras": ["mine"]}).status_code == 404


def test_loras_of_a_form_are_a_json_text_or_nested_fields(deploy, paths):
    server = deploy()
    text = json.dumps([{"path": paths["a"], "strength": 0.5}])
    assert drawn_with(server, server.post(data={"prompt": "a cube", "loras": text})) == [("a", 0.5, "all")]
    nested = {"prompt": "a cube", "loras[][path]": [paths["a"], paths["b"]], "loras[][strength]": ["0.5", "0.7"]}
    assert drawn_with(server, server.post(data=nested)) == [("a", 0.5, "all"), ("b", 0.7, "all")]
    sdk = server.client().images.generate(prompt="a cube", extra_body={"loras": [{"path": paths["a"]}]})
    assert sdk.loras == [{"nickname": "a", "strength": 1.0}]


def test_edits_take_loras(deploy, paths):
    server = deploy()
    made = server.post(json={"prompt": "a cube"}).json()["data"][0]["b64_json"]
    answer = server.client().images.edit(
        image=("cube.png", base64.b64decode(made), "image/png"),
        prompt="a ball",
        extra_body={"loras": json.dumps([{"path": paths["a"], "strength": 0.4}])},
    )
    assert [use.strength for use in server.engine.seen[answer.data[0].id].loras] == [0.4]


def test_a_model_name_may_name_a_lora(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    server.post("/v1/unmerge_lora_weights")
    assert draw(server, model="acme/painter-1:a") == [("a", 1.0, "all")]
    assert draw(server, model="gpt-image-1:a") == [("a", 1.0, "all")]
    assert draw(server, model="acme/painter-1:a", loras=[{"path": paths["b"]}]) == [
        ("a", 1.0, "all"),
        ("b", 1.0, "all"),
    ]
    assert draw(server, model="gpt-image-1:latest") == []
    answer = server.post(json={"prompt": "a cube", "model": "acme/painter-1:nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    listed = {model.id: model.parent for model in server.client().models.list()}
    assert listed == {"acme/painter-1": None, "acme/painter-1:a": "acme/painter-1"}
    assert server.client().models.retrieve("acme/painter-1:a").parent == "acme/painter-1"
    assert server.get("/v1/models/acme/painter-1:nobody").status_code == 404
    assert server.get("/v1/models/gpt-image-1:a").status_code == 404


def test_strict_names_take_loras_too(deploy, paths):
    server = deploy(strict_model=True)
    set_lora(server, lora_nickname="a", lora_path=paths["a"])
    assert draw(server, model="acme/painter-1:a") == [("a", 1.0, "all")]
    assert server.post(json={"prompt": "a cube", "model": "gpt-image-1:a"}).status_code == 404


@pytest.mark.parametrize(
    ("loras", "status", "param"),
    [
        ("nobody", 404, "loras[0]"),
        ([{"nickname": "nobody"}], 404, "loras[0].nickname"),
        ([{"path": "/absent"}], 404, "loras[0].path"),
        ([{"path": "../x"}], 400, "loras[0].path"),
        (["a", {"path": "acme/unknown"}], 404, "loras[1].path"),
        ([{}], 400, "loras[0]"),
        ([7], 400, "loras[0]"),
        (7, 400, "loras[0]"),
        ([{"nickname": "a", "strenght": 1}], 400, "loras[0]"),
        ([{"nickname": "a", "strength": 11}], 400, "loras[0].strength"),
        ([{"nickname": "a", "strength": 1, "scale": 2}], 400, "loras[0]"),
        ([{"nickname": "a", "target": "vae"}], 400, "loras[0].target"),
        (["a"] * 17, 400, "loras"),
        ("[{", 400, "loras"),
    ],
)
def test_mistakes_in_loras_name_the_entry_before_any_work(mistakes, loras, status, param):
    seen = len(mistakes.engine.seen)
    answer = mistakes.post(json={"prompt": "a cube", "loras": loras})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert len(mistakes.engine.seen) == seen


def test_a_lora_for_another_model_is_refused_before_the_job_is_taken(deploy, tmp_path):
    server = deploy()
    path = lora(tmp_path / "other.safetensors", "unet")
    for _ in range(2):
        answer = server.post(json={"prompt": "a cube", "loras": [{"path": path}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
    assert server.rows() == []


def test_the_worker_is_asked_once_for_a_file_that_stays_as_it_is(deploy, paths, tmp_path):
    server = deploy()
    for _ in range(3):
        draw(server, loras=[{"path": paths["a"]}])
    assert len(server.engine.lora_calls) == 1
    lora(tmp_path / "weights/a.safetensors", layers=3)
    draw(server, loras=[{"path": paths["a"]}])
    assert len(server.engine.lora_calls) == 2
    (tmp_path / "weights/a.safetensors").unlink()
    assert server.post(json={"prompt": "a cube", "loras": [{"path": paths["a"]}]}).status_code == 404


def test_a_target_without_effect_is_a_warning(deploy, paths):
    server = deploy()
    answer = server.post(json={"prompt": "a cube", "loras": [{"path": paths["a"], "target": "transformer_2"}]})
    assert "applied nowhere" in answer.headers["x-photogram-warning"]
    assert drawn_with(server, answer) == []


def test_files_and_streams_name_the_loras(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"], strength=0.5)
    data = base64.b64decode(server.post(json={"prompt": "a cube"}).json()["data"][0]["b64_json"])
    used = read_provenance(data).loras
    assert [(one.nickname, one.strength, one.target) for one in used] == [("a", 0.5, "all")]
    assert paths["a"].encode() not in data
    stream = server.client().images.generate(prompt="a cube", stream=True)
    assert list(stream)[-1].loras == [{"nickname": "a", "strength": 0.5}]


def test_a_lora_stays_in_the_record_of_its_picture(deploy, paths):
    server = deploy()
    set_lora(server, lora_nickname="a", lora_path=paths["a"], strength=0.5)
    draw(server)
    server.stop()
    store = open_store(Path(server.config.data_dir))

    async def read() -> JobRecord:
        try:
            return await store.get(server.rows()[0][0])
        finally:
            await store.close()

    uses = asyncio.run(read()).request.loras
    assert [(use.nickname, use.path, use.strength) for use in uses] == [("a", paths["a"], 0.5)]


def test_other_machines_may_name_only_files_of_the_folders(deploy, tmp_path, paths):
    lora(tmp_path / "shelf/ink.safetensors")
    server = deploy(host="0.0.0.0", lora_dir=(str(tmp_path / "shelf"),))
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    for answer in (
        set_lora(server, lora_nickname="x", lora_path=paths["a"]),
        server.post(json={"prompt": "a cube", "loras": [{"path": paths["a"]}]}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "path_not_allowed")
    assert draw(server, loras=["ink"]) == draw(server, loras=[{"path": "ink"}]) == [("ink", 1.0, "all")]
    lora(tmp_path / "shelf/later.safetensors")
    assert draw(server, model="acme/painter-1:later") == [("later", 1.0, "all")]
    assert {"acme/painter-1:ink", "acme/painter-1:later"} <= {one.id for one in server.client().models.list()}
    assert set_lora(server, lora_nickname="ink").status_code == 200


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_lora_of_the_command_line_is_set_before_the_first_picture(deploy, paths):
    server = deploy(lora_path=(paths["a"],), lora_scale=(0.7,))
    assert draw(server) == [("default", 0.7, "all")]
    server.post("/v1/unmerge_lora_weights")
    server.post("/v1/merge_lora_weights")
    assert set_lora(server, lora_nickname="default").status_code == 200
    assert active(server) == {"transformer": [("default", 1.0, True)]}


def test_several_loras_of_the_command_line_are_merged_in_order(deploy, paths):
    server = deploy(lora_path=(paths["a"], paths["b"]), lora_scale=(0.7, 0.4))
    assert draw(server) == [("a", 0.7, "all"), ("b", 0.4, "all")]
    server.stop()
    server = deploy(lora_path=(paths["a"], paths["b"]), lora_nickname=("x", "y"), lora_scale=(0.5,))
    assert draw(server) == [("x", 0.5, "all"), ("y", 0.5, "all")]


def test_requests_that_come_while_the_model_loads_wait_for_the_lora_of_the_command_line(deploy, paths):
    server = deploy(lora_path=(paths["a"],), state="loading")
    server.engine.lora_pause_s = 0.3
    server.engine.state = "ready"
    assert draw(server) == [("default", 1.0, "all")]


def test_a_lora_of_the_command_line_that_cannot_be_used_ends_the_start(deploy, tmp_path, paths):
    with pytest.raises(ConfigError, match="--lora-path '/absent'"):
        deploy(lora_path=("/absent",))
    with pytest.raises(ConfigError, match="names two LoRAs"):
        deploy(lora_path=(paths["a"], paths["b"]), lora_nickname=("x", "x"))

    def start_and_fail() -> None:
        # The start ends once the worker has looked at the file: before or after the server was first asked.
        server = deploy(lora_path=(lora(tmp_path / "other.safetensors", "unet"),))
        wait_until(lambda: server.error is not None)
        raise server.error

    with pytest.raises(ConfigError, match="not made for this model"):
        start_and_fail()
