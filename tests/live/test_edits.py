"""`POST /v1/images/edits` on the built-in model: the seed document's examples, the SDK, masks, and what is refused."""

import base64
import io
import itertools
import json
import re
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tools.demo_models.score import parse_prompt, score_image

from .test_seed_examples import shell

CURL_EDIT = r"""
curl -sS -X POST "http://localhost:30010/v1/images/edits" \
-H "Authorization: Bearer sk-proj-1234567890" \
-F "image=@local_input_image.png" \
-F "url=image_url.jpg" \
-F "prompt=A calico cat playing a piano on stage" \
-F "size=1024x1024" \
-F "response_format=b64_json"
"""


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def png(picture: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


def distance(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of the pixels, from 0 to 255."""
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean())


@pytest.fixture(scope="module")
def drawn(live_server) -> Image.Image:
    answer = live_server.client().images.generate(
        prompt="a red circle on a blue background", size="256x256", extra_body={"seed": 5}
    )
    return opened(answer.data[0].b64_json)


def post(server, **parts) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/edits", timeout=120, **parts)


def error_of(answer: httpx.Response) -> dict[str, object]:
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    return {"status": answer.status_code, **answer.json()["error"]}


def test_curl_examples_of_the_seed_document_run_verbatim(live_server, drawn, tmp_path):
    drawn.save(tmp_path / "local_input_image.png")
    item = json.loads(shell(CURL_EDIT, live_server, tmp_path))["data"][0]
    assert opened(item["b64_json"]).size == (1024, 1024)
    item = json.loads(shell(CURL_EDIT.replace("=b64_json", "=url"), live_server, tmp_path))["data"][0]
    assert re.fullmatch(r"/v1/images/img_[0-9a-f]{32}/content", item["url"])
    assert httpx.get(f"{live_server.url}{item['url']}").headers["content-type"] == "image/png"


def test_the_placeholder_url_is_named_as_ignored(live_server, drawn):
    parts = {"data": {"prompt": "make it green", "url": "image_url.jpg"}, "files": {"image": ("a.png", png(drawn))}}
    answer = post(live_server, **parts)
    assert answer.status_code == 200
    assert answer.headers["x-photogram-ignored"] == "url"


@pytest.mark.parametrize("as_list", [False, True])
def test_sdk_edits_one_file_or_a_list(live_server, drawn, as_list):
    file = ("cat.png", png(drawn), "image/png")
    answer = live_server.client().images.edit(
        image=[file] if as_list else file, prompt="make the background yellow", n=2, extra_body={"seed": 1}
    )
    assert [item.seed for item in answer.data] == [1, 2]
    # The aspect and so the size of the first input, where none is asked for.
    assert opened(answer.data[0].b64_json).size == (256, 256)
    assert np.abs(np.asarray(opened(answer.data[0].b64_json)).astype(int) - np.asarray(drawn)).mean() > 10


def test_bytes_without_a_name_jpeg_and_webp_are_told_by_their_content(live_server, drawn):
    for format in ("PNG", "JPEG", "WEBP"):
        answer = live_server.client().images.edit(image=png(drawn, format), prompt="remove the circle")
        assert len(answer.data) == 1


def test_json_form_takes_data_urls_and_pictures_of_this_server(live_server, drawn):
    url = "data:image/png;base64," + base64.b64encode(png(drawn)).decode()
    body = {"prompt": "make the circle white", "images": [{"image_url": url}], "seed": 3}
    first = post(live_server, json=body).json()["data"][0]
    again = post(live_server, json={**body, "images": url}).json()["data"][0]
    assert first["b64_json"] == again["b64_json"]
    own = f"/v1/images/{first['id']}/content"
    assert post(live_server, json={"prompt": "make it red", "url": own}).status_code == 200


def test_size_auto_has_the_aspect_of_the_first_input(live_server):
    wide = png(Image.new("RGB", (400, 200), "navy"))
    answer = live_server.client().images.edit(image=wide, prompt="add a yellow star")
    width, height = opened(answer.data[0].b64_json).size
    assert width == pytest.approx(2 * height, rel=0.1)
    asked = live_server.client().images.edit(image=wide, prompt="add a yellow star", size="300x200")
    assert opened(asked.data[0].b64_json).size == (300, 200)


def test_outside_the_mask_the_inputs_pixels_come_back(live_server, drawn):
    mask = Image.new("RGBA", drawn.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (128, 0, 256, 256))
    answer = live_server.client().images.edit(
        image=png(drawn), mask=png(mask), prompt="make the background yellow", extra_body={"seed": 2}
    )
    edited = np.asarray(opened(answer.data[0].b64_json)).astype(int)
    original = np.asarray(drawn).astype(int)
    assert (edited[:, :127] == original[:, :127]).all()
    assert np.abs(edited[:, 130:] - original[:, 130:]).mean() > 10


def test_stream_has_the_edits_own_events(live_server, drawn):
    events = list(
        live_server.client().images.edit(
            image=png(drawn), prompt="make the circle green", stream=True, partial_images=2
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_variations_show_what_the_picture_shows_and_differ_by_their_seed(live_server, drawn):
    client, spec = live_server.client(), parse_prompt("a red circle on a blue background")
    answer = client.images.create_variation(
        image=png(drawn), n=3, size="256x256", response_format="b64_json", extra_body={"seed": 1}
    )
    variations = [opened(item.b64_json) for item in answer.data]
    assert [item.seed for item in answer.data] == [1, 2, 3]
    for variation in variations:
        verdict = score_image(variation, spec)
        assert (verdict.background, verdict.colour) == (True, True)
    # On the same background, so that what differs is the thing alone.
    others = [f"a {other} on a blue background" for other in ("yellow star", "green square", "white heart")]
    unrelated = [
        opened(client.images.generate(prompt=one, size="256x256", extra_body={"seed": 1}).data[0].b64_json)
        for one in others
    ]
    assert max(distance(drawn, one) for one in variations) < 0.6 * min(distance(drawn, one) for one in unrelated)
    for one, other in itertools.combinations(variations, 2):
        assert distance(one, other) > 0.3


def test_strength_says_how_far_an_edit_goes(live_server, drawn):
    def reached(strength: float) -> float:
        answer = live_server.client().images.edit(
            image=png(drawn), prompt="a red circle", extra_body={"seed": 1, "strength": strength, "steps": 8}
        )
        return distance(drawn, opened(answer.data[0].b64_json))

    assert reached(0.2) < reached(1.0)
    refused = post(live_server, data={"prompt": "x", "strength": "1.5"}, files={"image": ("a.png", png(drawn))})
    assert error_of(refused)["param"] == "strength"


REFUSED = {
    "no picture": ({"data": {"prompt": "x"}}, "image", "missing_required_parameter"),
    "a placeholder alone": ({"data": {"prompt": "x", "url": "image_url.jpg"}}, "url", "invalid_image_url"),
    "text": ({"data": {"prompt": "x"}, "files": {"image": ("a.png", b"hello")}}, "image", "invalid_image"),
    "svg": ({"data": {"prompt": "x"}, "files": {"image": ("a.svg", b"<svg/>")}}, "image", "invalid_image"),
    "a server inside": ({"json": {"prompt": "x", "url": "http://127.0.0.1/a.png"}}, "url", "url_not_allowed"),
    "a file path": ({"json": {"prompt": "x", "image": "/etc/passwd"}}, "image", "invalid_image_url"),
    "a broken data URL": (
        {"json": {"prompt": "x", "image": "data:image/png;base64,@@@"}},
        "image",
        "invalid_base64_image",
    ),
    "a file id": ({"json": {"prompt": "x", "images": [{"file_id": "file-1"}]}}, "images", "file_not_found"),
    "an unknown picture": (
        {"json": {"prompt": "x", "url": f"/v1/images/img_{'0' * 32}/content"}},
        "url",
        "content_not_found",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused_by_name(live_server, case):
    parts, param, code = REFUSED[case]
    error = error_of(post(live_server, **parts))
    assert error["status"] in (400, 404)
    assert (error["param"], error["code"]) == (param, code)


def test_a_picture_too_large_is_refused_before_it_is_decoded(live_server):
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "PNG")
    error = error_of(post(live_server, data={"prompt": "x"}, files={"image": ("b.png", bomb.getvalue())}))
    assert (error["status"], error["code"]) == (400, "image_too_large")


def test_truncated_pictures_never_break_the_server(live_server, drawn):
    whole = png(drawn)
    for length in (10, 60, 500, len(whole) // 2):
        error = error_of(post(live_server, data={"prompt": "x"}, files={"image": ("a.png", whole[:length])}))
        assert (error["status"], error["param"]) == (400, "image")


def test_mask_must_fit_and_have_an_alpha_channel(live_server, drawn):
    for mask in (Image.new("RGBA", (64, 64)), Image.new("RGB", drawn.size)):
        files = {"image": ("a.png", png(drawn)), "mask": ("m.png", png(mask))}
        assert error_of(post(live_server, data={"prompt": "x"}, files=files))["param"] == "mask"


def test_prompt_is_needed_and_seventeen_pictures_are_too_many(live_server, drawn):
    with pytest.raises(openai.BadRequestError) as raised:
        live_server.client().images.edit(image=png(drawn), prompt="")
    assert raised.value.param == "prompt"
    many = [("image[]", (f"{i}.png", png(drawn))) for i in range(17)]
    assert post(live_server, data={"prompt": "x"}, files=many).status_code == 400


def test_inputs_are_gone_once_the_edit_is_done(live_server, drawn):
    live_server.client().images.edit(image=png(drawn), prompt="make the circle green")
    inputs = Path(live_server.folder) / "data" / "inputs"
    deadline = time.monotonic() + 20  # they go right after the answer
    while any(inputs.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(inputs.iterdir()) == []
