"""`POST /v1/images/generations` through the official SDK and raw HTTP: the answers."""

from __future__ import annotations

import asyncio
import base64
import io

import httpx
import msgspec
import pytest
from PIL import Image

from photogram.media.provenance import read_provenance

from .fake_engine import image_card, video_card

URL = "/v1/images/generations"


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def decoded(b64_json: str) -> Image.Image:
    return opened(base64.b64decode(b64_json))


def test_sdk_gets_a_picture_that_passes_strict_validation(server):
    answer = server.client().images.generate(prompt="a red cube", size="128x96", response_format="b64_json")
    assert decoded(answer.data[0].b64_json).size == (128, 96)
    assert answer.data[0].url is None
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("128x96", "png", "opaque", None)
    assert answer.usage.input_tokens == 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer._request_id.startswith("req_")


def test_a_picture_in_a_lossy_mode_says_so_and_so_does_its_file(server):
    body = {"quality_mode": "high", "steps": 30}
    answer = server.client().images.generate(prompt="a red cube", extra_body=body)
    assert answer.quality_mode == "high"
    assert read_provenance(base64.b64decode(answer.data[0].b64_json)).quality_mode == "high"
    exact = server.client().images.generate(prompt="a red cube", extra_body=body | {"quality_mode": "exact"})
    assert "quality_mode" not in exact.model_dump()


def test_async_sdk_gets_a_picture(server):
    async def ask():
        async with server.async_client() as client:
            return await client.images.generate(prompt="a red cube")

    answer = asyncio.run(ask())
    assert decoded(answer.data[0].b64_json).size == (64, 48)


def test_raw_and_streaming_response_forms_of_the_sdk_work(server):
    raw = server.client().images.with_raw_response.generate(prompt="a cube")
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["openai-processing-ms"].isdecimal()
    assert raw.parse().data[0].b64_json
    with server.client().images.with_streaming_response.generate(prompt="a cube") as response:
        assert response.parse().data[0].b64_json


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a cube", "n": "2", "seed": "7", "stream": "false", "guidance_scale": "3"},
        {"prompt": "a cube", "n": 2.0, "seed": 7, "stream": None, "guidance_scale": 3},
    ],
)
def test_numbers_and_flags_may_be_texts(server, body):
    answer = server.post(json=body)
    assert answer.status_code == 200
    items = answer.json()["data"]
    assert [item["seed"] for item in items] == [7, 8]
    assert server.engine.seen[items[0]["id"]].guidance_scale == 3.0


def test_every_spelling_of_a_body_means_the_same(server):
    fields = {"prompt": "ein süßer Würfel", "seed": "5", "steps": "3", "prompt_2": "x y"}
    answers = [
        server.post(json=fields),
        server.post(
            content=b'{"prompt": "ein s\xc3\xbc\xc3\x9fer W\xc3\xbcrfel", "seed": 5, "steps": 3, "prompt_2": "x y"}'
        ),
        server.post(
            content='{"prompt": "ein süßer Würfel", "seed": 5, "steps": 3, "prompt_2": "x y"}'.encode(),
            headers={"content-type": "application/x-www-form-urlencoded"},
        ),
        server.post(data=fields),
        server.post(files=[(name, (None, value)) for name, value in fields.items()]),
        server.post(json={"prompt": fields["prompt"]}, params={"seed": 5, "steps": 3, "prompt_2": "x y"}),
        server.post(json={"prompt": fields["prompt"], "extra_body": {"seed": 5, "steps": 3, "prompt_2": "x y"}}),
        server.post(json={"prompt": fields["prompt"], "extra_params": '{"seed": 5, "steps": 3, "prompt_2": "x y"}'}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    requests = [server.engine.seen[answer.json()["data"][0]["id"]] for answer in answers]
    for request in requests:
        assert (request.prompt, request.seed, request.num_inference_steps) == ("ein süßer Würfel", 5, 3)
        assert request.extra == {"prompt_2": "x y"}
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1


def test_sdk_extras_reach_the_engine(server):
    answer = server.client().images.generate(
        prompt="a cube",
        extra_body={"seed": 11, "num_inference_steps": 6, "negative_prompt": "dark", "eta": 0.5, "priority": 3},
        extra_query={"max_sequence_length": 64},
    )
    request = server.engine.seen[answer.data[0].id]
    assert (request.seed, request.num_inference_steps, request.negative_prompt) == (11, 6, "dark")
    assert request.extra == {"eta": 0.5, "max_sequence_length": 64}
    assert request.priority == 3


def test_n_pictures_have_seeds_in_a_row_and_ids_of_their_own(server):
    answer = server.post(json={"prompt": "a cube", "n": 3, "seed": 100}).json()
    assert [item["seed"] for item in answer["data"]] == [100, 101, 102]
    assert len({item["id"] for item in answer["data"]}) == 3
    assert len({item["b64_json"] for item in answer["data"]}) == 3
    assert answer["usage"]["input_tokens"] == 6


def test_absent_seed_is_random_and_told(server):
    seeds = {server.post(json={"prompt": "a cube"}).json()["data"][0]["seed"] for _ in range(4)}
    assert len(seeds) == 4
    seed = seeds.pop()
    first, second = (server.post(json={"prompt": "a cube", "seed": seed}).json()["data"][0] for _ in range(2))
    assert first["b64_json"] == second["b64_json"]


def test_size_asked_for_is_the_size_delivered_and_the_drawn_one_is_told(server):
    for asked, drawn in (("100x52", "112x64"), ("512x512", "256x256"), ("1024x768", "288x224")):
        answer = server.post(json={"prompt": "a cube", "size": asked}).json()
        picture = decoded(answer["data"][0]["b64_json"])
        assert f"{picture.width}x{picture.height}" == asked == answer["size"]
        assert answer["data"][0]["generated_size"] == drawn


@pytest.mark.parametrize(
    ("asked", "format", "content_type"),
    [
        ("png", "PNG", "image/png"),
        ("jpeg", "JPEG", "image/jpeg"),
        ("jpg", "JPEG", "image/jpeg"),
        ("webp", "WEBP", "image/webp"),
    ],
)
def test_output_formats(server, asked, format, content_type):
    answer = server.post(json={"prompt": "a cube", "output_format": asked}).json()
    assert decoded(answer["data"][0]["b64_json"]).format == format
    assert answer["output_format"] == asked.replace("jpg", "jpeg")
    assert server.get(f"/v1/images/{answer['data'][0]['id']}/content").headers["content-type"] == content_type


def size_of(server, **fields) -> int:
    body = {"prompt": "a cube", "seed": 1, "size": "256x256", **fields}
    return len(base64.b64decode(server.post(json=body).json()["data"][0]["b64_json"]))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_presets_are_compressions_and_compression_wins(server, format):
    def size(**fields):
        return size_of(server, output_format=format, **fields)

    for preset, compression in (("maximum", 100), ("high", 90), ("medium", 55), ("low", 35), ("default", 75)):
        assert size(output_quality=preset) == size(output_compression=compression)
    assert size() == size(**{"output-quality": "default"})
    assert size(output_quality="low", output_compression=90) == size(**{"output-compression": "90"})
    assert size(output_compression=0) < size(output_compression=50) < size(output_compression=100)


def test_png_has_the_same_bytes_at_any_quality(server):
    pictures = {
        server.post(json={"prompt": "a cube", "seed": 3, **fields}).json()["data"][0]["b64_json"]
        for fields in ({}, {"output_compression": 0}, {"output_quality": "maximum"}, {"user": "me"})
    }
    assert len(pictures) == 1


def test_absent_response_format_is_url_for_dall_e_names_only(server):
    assert "url" in server.post(json={"prompt": "a cube", "model": "dall-e-3"}).json()["data"][0]
    for model in ("gpt-image-1", "anything", None):
        item = server.post(json={"prompt": "a cube", "model": model}).json()["data"][0]
        assert "b64_json" in item
        assert "url" not in item
    item = server.post(json={"prompt": "a cube", "model": "dall-e-2", "response_format": "b64_json"}).json()["data"][0]
    assert "url" not in item


def test_public_url_makes_urls_absolute(deploy):
    server = deploy(public_url="https://pictures.example/api/")
    item = server.post(json={"prompt": "a cube", "response_format": "url"}).json()["data"][0]
    assert item["url"] == f"https://pictures.example/api/v1/images/{item['id']}/content"


@pytest.mark.parametrize(
    ("asked", "steps", "echo"), [("low", 2, "low"), ("high", 8, "high"), ("hd", 4, None), ("auto", 4, None)]
)
def test_quality_words_choose_steps_where_the_card_says_so(server, asked, steps, echo):
    answer = server.client().images.generate(prompt="a cube", quality=asked)
    assert server.engine.seen[answer.data[0].id].num_inference_steps == steps
    assert answer.quality == echo


def test_unknown_fields_are_named_in_a_header_and_documented_ones_are_not(server):
    answer = server.post(
        json={
            "prompt": "a cube",
            "frobnicate": 1,
            "ß\n": 2,
            "user": "u",
            "style": "vivid",
            "moderation": "low",
            "partial_images": 2,
        },
        params={"api-version": "2025-04-01", "wobble": "x"},
    )
    assert answer.status_code == 200
    ignored = answer.headers["x-photogram-ignored"].split(", ")
    assert sorted(ignored) == sorted(["partial_images", "frobnicate", "??", "wobble"])
    assert "x-photogram-ignored" not in server.post(json={"prompt": "a cube"}).headers


def test_body_wins_over_query_and_the_loser_is_named(server):
    answer = server.post(json={"prompt": "a cube", "seed": 1}, params={"seed": 2})
    assert answer.json()["data"][0]["seed"] == 1
    assert answer.headers["x-photogram-ignored"] == "seed"


def test_uploads_have_no_meaning_here_and_are_named(server):
    answer = server.post(data={"prompt": "a cube"}, files={"image": ("a.png", b"x" * 3_000_000, "image/png")})
    assert answer.status_code == 200
    assert answer.headers["x-photogram-ignored"] == "image"


def test_warnings_of_the_engine_and_of_the_server_reach_the_client(server):
    answer = server.post(json={"prompt": "warn me", "background": "transparent", "n": 2})
    assert answer.headers["x-photogram-warning"].count("77 tokens") == 1
    assert "not transparent" in answer.headers["x-photogram-warning"]


def test_fields_that_the_model_has_no_use_for_are_ignored_by_name(deploy):
    server = deploy(card=image_card(takes_guidance=False, takes_negative_prompt=False, default_guidance=None))
    answer = server.post(json={"prompt": "a cube", "guidance_scale": 3, "negative_prompt": "dark"})
    assert set(answer.headers["x-photogram-ignored"].split(", ")) == {"guidance_scale", "negative_prompt"}
    request = server.engine.seen[answer.json()["data"][0]["id"]]
    assert (request.guidance_scale, request.negative_prompt) == (None, None)


def test_paths_with_and_without_v1_with_trailing_slashes_and_azures(server):
    for path in (URL, URL + "/", "/images/generations", "/images/generations/"):
        assert server.post(path, json={"prompt": "a cube"}, follow_redirects=False).status_code == 200
    answer = server.post(
        "/openai/deployments/dall-e-3/images/generations?api-version=2024-02-01", json={"prompt": "a cube"}
    )
    assert "url" in answer.json()["data"][0]


def test_azure_sdk_client_works(server):
    from openai import AzureOpenAI

    client = AzureOpenAI(
        api_key="k", api_version="2025-04-01-preview", azure_endpoint=server.url, _strict_response_validation=True
    )
    assert client.images.generate(model="painter", prompt="a cube").data[0].b64_json


def test_request_id_of_the_client_is_kept_when_it_is_sane(server):
    assert server.post(json={"prompt": "x"}, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "<script>"):
        answer = server.post(json={"prompt": "x"}, headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req_")


def test_files_tell_how_they_were_made_unless_told_not_to(server, deploy):
    body = {"prompt": "a tell-tale cube", "seed": 9}
    told = decoded(server.post(json=body).json()["data"][0]["b64_json"])
    assert "tell-tale" in str(told.info)
    quiet = deploy(metadata=False)
    assert "tell-tale" not in str(decoded(quiet.post(json=body).json()["data"][0]["b64_json"]).info)


def test_rows_are_completed_and_no_frames_are_left(deploy):
    server = deploy()
    answer = server.post(json={"prompt": "a cube", "n": 4}).json()
    assert server.rows() == [(item["id"], "completed", None) for item in answer["data"]]
    assert server.leftover_frames() == []


def test_a_model_of_clips_from_pictures_refuses_pictures_and_says_where_to_go(deploy):
    server = deploy(card=msgspec.structs.replace(video_card(), tasks=("I2V",)))
    answer = server.post(json={"prompt": "a cube"})
    assert answer.status_code == 400
    assert "/v1/videos" in answer.json()["error"]["message"]


def test_edit_only_model_refuses_a_prompt_alone(deploy):
    server = deploy(card=image_card(tasks=("I2I",)))
    answer = server.post(json={"prompt": "a cube"})
    assert answer.status_code == 400
    assert "/v1/images/edits" in answer.json()["error"]["message"]


def test_strict_model_names(deploy):
    server = deploy(strict_model=True)
    answer = server.post(json={"prompt": "a cube", "model": "gpt-image-1"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert server.post(json={"prompt": "a cube", "model": "acme/painter-1"}).status_code == 200


def test_hundred_requests_at_once_all_get_their_own_picture(server):
    async def ask():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            bodies = [{"prompt": "a cube", "seed": seed, "size": "16x16"} for seed in range(100)]
            return await asyncio.gather(*(client.post(server.url + URL, json=body) for body in bodies))

    answers = asyncio.run(ask())
    assert [answer.json()["data"][0]["seed"] for answer in answers] == list(range(100))
