"""Models, probes, keys, the page and the API's description."""

from __future__ import annotations

import re

import httpx
import openai
import pytest

from photogram import __version__

from .fake_engine import video_card


def test_models_has_the_seven_keys_of_the_seed(server):
    for path in ("/models", "/models/"):
        assert server.get(path).json() == {
            "model_path": "/models/painter",
            "task_type": "T2I",
            "supported_task_types": ["T2I", "TI2I"],
            "pipeline_name": "flux2_klein_pipeline",
            "pipeline_class": "Flux2KleinPipeline",
            "num_gpus": 1,
            "dit_precision": "bf16",
            "vae_precision": "fp32",
            "supports_lora": True,
        }


def test_video_model_is_described_as_one(deploy):
    server = deploy(card=video_card())
    assert server.get("/models").json()["pipeline_name"] == "wan_pipeline"
    assert server.get("/model_info").json()["output_types"] == ["VIDEO"]


def test_sdk_lists_and_retrieves_the_model(server):
    client = server.client()
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("acme/painter-1", "model", "photogram")
    assert client.models.retrieve("acme/painter-1").id == "acme/painter-1"
    assert client.models.retrieve("acme/painter-1").created == model.created
    assert server.get("/v1/models/acme/painter-1").status_code == 200
    assert server.get("/v1/models").json()["data"][0]["pipeline_class"] == "Flux2KleinPipeline"


@pytest.mark.parametrize("name", ["no/such", "gpt-image-1", "a b?c#d"])
def test_unknown_model_is_404(server, name):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().models.retrieve(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_probes_and_information(server):
    for path in ("/health", "/liveness", "/v1/health", "/health/"):
        assert server.get(path).json() == {"status": "ok"}
    for path in ("/ready", "/health_generate", "/v1/ready"):
        assert server.get(path).json()["status"] == "ready"
    assert server.get("/version").json() == {"version": __version__}
    info = server.get("/server_info").json()
    assert (info["served_model_name"], info["version"], info["state"]) == ("acme/painter-1", __version__, "ready")
    assert server.get("/v1/model_info").json() == {"model_path": "/models/painter"}


# --- keys ---------------------------------------------------------------------------------------------------------


def test_without_keys_any_token_and_none_are_accepted(server):
    assert server.get("/v1/models").status_code == 200
    assert server.get("/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200


def test_with_keys_everything_but_life_readiness_and_the_page_needs_one(deploy, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# people\nkey-from-file\n\n")
    server = deploy(api_key=("key-one", "key-two"), api_key_file=str(file))
    for path in ("/", "/health", "/ready"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/models", "/server_info", "/openapi.json", "/nothing"):
        answer = server.get(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "missing_api_key"
    for key in ("key-one", "key-two", "key-from-file"):
        assert server.client(api_key=key).models.list().data
        assert server.get("/v1/models", headers={"api-key": key}).status_code == 200
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client(api_key="sk-wrong-key-of-somebody").models.list()
    assert (caught.value.code, caught.value.type, caught.value.param) == (
        "invalid_api_key",
        "invalid_request_error",
        None,
    )
    assert "wrong-key-of" not in caught.value.message
    for header in ("Basic a2V5LW9uZQ==", "Bearer", "key-one", "Bearer ümlaut".encode("latin-1")):
        assert server.get("/v1/models", headers={"authorization": header}).status_code == 401


def test_key_file_that_cannot_be_used_refuses_to_start(deploy, tmp_path):
    from photogram.core.errors import ConfigError

    with pytest.raises(ConfigError, match="--api-key-file"):
        deploy(api_key_file=str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="holds no key"):
        deploy(api_key_file=str(tmp_path / "empty"))


def test_admin_routes_tell_apart_no_key_a_good_key_and_the_admin_key():
    from starlette.datastructures import Headers

    from photogram.core.errors import Forbidden, Unauthorized
    from photogram.server.auth import Keys

    def headers(key):
        return Headers({} if key is None else {"authorization": f"Bearer {key}"})

    keys = Keys(["user"], admin_key="admin")
    keys.require_admin(headers("admin"))
    with pytest.raises(Forbidden):
        keys.require_admin(headers("user"))
    for key in (None, "wrong"):
        with pytest.raises(Unauthorized):
            keys.require_admin(headers(key))
    Keys([]).require_admin(headers(None))
    Keys(["user"]).require_admin(headers("user"))
    with pytest.raises(Unauthorized):
        Keys(["user"]).require_admin(headers(None))
    assert keys.owner(headers("admin")) != keys.owner(headers("user"))


# --- page and description -----------------------------------------------------------------------------------------


def test_page_is_one_file_that_asks_nobody_else(server):
    answer = server.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", answer.text)
    assert len(answer.content) < 60_000
    for word in ("prompt", "seed", "steps", "negative", "stream_progress", "prefers-color-scheme"):
        assert word in answer.text


def test_description_matches_the_routes_and_the_table(server):
    from photogram.server.schemas import image_fields

    document = server.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    properties = document["components"]["schemas"]["ImagesRequest"]["properties"]
    assert {field.name for field in image_fields(200)} <= set(properties)
    assert properties["num_inference_steps"]["maximum"] == 200
    assert properties["n"]["minimum"] == 1
    for path, methods in document["paths"].items():
        for method in methods:
            concrete = re.sub(r"{\w+}", "x", path.replace("{model}", "acme/painter-1"))
            answer = httpx.request(method, server.url + concrete, json={} if method == "post" else None, timeout=20)
            assert answer.status_code in (200, 400) or answer.json()["error"]["code"].endswith("_not_found")


def test_every_reference_in_the_description_resolves(server):
    text = server.get("/openapi.json").text
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= set(schemas)


def test_what_each_quality_mode_does_is_told(server):
    modes = server.get("/v1/models").json()["data"][0]["quality_modes"]
    assert list(modes) == ["exact", "high", "fast"]
    assert "forecast" in modes["fast"]
    assert "forecast" not in modes["exact"]
