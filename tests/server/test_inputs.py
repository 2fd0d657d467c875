"""Input pictures over HTTP: every way to name one, whose they are, and what they cost when they are refused."""

import base64
import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from media.test_decoder_pool import png_of_size, saved
from net.web import Web, endless, lead_to, say
from photogram.jobs import inputs as input_folders
from photogram.server.edits import VARIATION_STRENGTH

from .conftest import wait_until
from .fake_engine import image_card

EDITS = "/v1/images/edits"


def png(colour="red", size=(64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def pictures():
    """A web server on loopback with a picture at /a.png."""
    server = Web({"/a.png": say(png("lime"))})
    yield server
    server.close()


def colours_of_inputs(server) -> list[tuple[int, ...]]:
    """The colour of each input of the job that is running now; the job goes on and is waited for."""
    wait_until(lambda: server.engine.num_running == 1)
    (request,) = (server.engine.seen[job_id] for job_id in server.engine._jobs)
    colours = [Image.open(path).getpixel((3, 3)) for path in request.images]
    server.engine.released.set()
    return colours


def inputs_left(server) -> list[Path]:
    folder = Path(server.config.data_dir) / "inputs"
    return list(folder.iterdir()) if folder.exists() else []


def edit_in_background(server, **parts):
    server.engine.released.clear()
    return ThreadPoolExecutor(1).submit(server.post, EDITS, **parts)


def error_of(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_pictures_of_every_kind_come_to_the_worker_in_order(deploy, pictures):
    server = deploy(allow_url_host=(f"127.0.0.1:{pictures.port}",))
    made = server.post(json={"prompt": "x", "size": "64x48", "seed": 1}).json()["data"][0]
    body = {
        "prompt": "hold",
        "images": [
            {"image_url": data_url(png("blue"))},
            {"image_url": {"url": f"{pictures.url}/a.png"}},
            f"/v1/images/{made['id']}/content",
            f"{server.url}/v1/images/{made['id']}/content",
        ],
    }
    answer = edit_in_background(server, json=body)
    blue, lime, own, same = colours_of_inputs(server)
    assert (blue, lime) == ((0, 0, 255), (0, 255, 0))
    assert own == same
    assert answer.result().status_code == 200
    wait_until(lambda: inputs_left(server) == [])


def test_forms_have_files_in_order_and_then_urls(deploy, pictures):
    server = deploy(allow_url_host=(f"127.0.0.1:{pictures.port}",))
    files = [("image[]", ("a.png", png("red"))), ("image[]", ("b.png", png("blue")))]
    answer = edit_in_background(
        server, data={"prompt": "hold", "url": f"{pictures.url}/a.png", "url[]": "image_url.jpg"}, files=files
    )
    assert colours_of_inputs(server) == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert answer.result().headers["x-photogram-ignored"] == "url"


def test_a_public_url_is_recognised_as_this_servers_own(deploy):
    server = deploy(public_url="https://pictures.example/")
    made = server.post(json={"prompt": "x", "response_format": "url"}).json()["data"][0]
    assert made["url"].startswith("https://pictures.example/")
    assert server.post(EDITS, json={"prompt": "x", "image": made["url"]}).status_code == 200


def test_pictures_of_another_key_are_not_found(deploy):
    server = deploy(api_key=("sk-one", "sk-two"))
    mine = {"headers": {"authorization": "Bearer sk-one"}}
    made = server.post(json={"prompt": "x"}, **mine).json()["data"][0]
    body = {"prompt": "x", "url": f"/v1/images/{made['id']}/content"}
    assert server.post(EDITS, json=body, **mine).status_code == 200
    answer = server.post(EDITS, json=body, headers={"authorization": "Bearer sk-two"})
    assert error_of(answer) == (404, "url", "content_not_found")


REFUSED_URLS = {
    "loopback": "http://127.0.0.1:{port}/a.png",
    "its name": "http://localhost:{port}/a.png",
    "IPv6": "http://[::1]:{port}/a.png",
    "mapped": "http://[::ffff:127.0.0.1]:{port}/a.png",
    "decimal": "http://2130706433:8080/a.png",
    "octal": "http://0177.0.0.1/a.png",
    "hexadecimal": "http://0x7f.1/a.png",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "private": "http://10.0.0.1/a.png",
    "user name": "http://example.com@127.0.0.1/a.png",
    "file": "file:///etc/passwd",
}


@pytest.mark.parametrize("case", REFUSED_URLS)
def test_urls_to_the_inside_are_refused_before_any_work(server, pictures, case):
    url = REFUSED_URLS[case].format(port=pictures.port)
    status, param, code = error_of(server.post(EDITS, json={"prompt": "x", "url": url}))
    assert (status, param) == (400, "url")
    assert code in ("url_not_allowed", "invalid_image_url")
    assert pictures.seen == []
    assert inputs_left(server) == []


def test_redirects_endless_bodies_and_other_files_are_refused(deploy, pictures):
    pictures.pages |= {
        "/inside": lead_to("http://169.254.169.254/"),
        "/circle": lead_to("/circle"),
        "/endless": endless,
        "/page": say(b"<html>no picture</html>", content_type="image/png"),
    }
    server = deploy(allow_url_host=(f"127.0.0.1:{pictures.port}",), max_upload_mb=1)
    codes = [
        error_of(server.post(EDITS, json={"prompt": "x", "url": pictures.url + path}))
        for path in ("/inside", "/circle", "/endless", "/page", "/nothing")
    ]
    assert codes == [
        (400, "url", "url_not_allowed"),
        (400, "url", "url_fetch_failed"),
        (413, "url", "request_too_large"),
        (400, "url", "invalid_image"),
        (400, "url", "url_fetch_failed"),
    ]
    assert inputs_left(server) == []


def test_fetching_can_be_turned_off(deploy, pictures):
    server = deploy(allow_url_host=(f"127.0.0.1:{pictures.port}",), fetch_urls=False)
    answer = server.post(EDITS, json={"prompt": "x", "url": f"{pictures.url}/a.png"})
    assert error_of(answer) == (400, "url", "unsupported_image_url")
    assert pictures.seen == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "image", "missing_required_parameter"),
        ({"image": "/etc/passwd"}, "image", "invalid_image_url"),
        ({"image": "../../etc/passwd"}, "image", "invalid_image_url"),
        ({"image": "\0.png"}, "image", "invalid_image_url"),
        ({"image": 7}, "image", "invalid_type"),
        ({"images": [{}]}, "images", "invalid_value"),
        ({"images": [{"image_url": "data:,x", "file_id": "file-1"}]}, "images", "invalid_value"),
        ({"images": [{"file_id": 3}]}, "images", "invalid_type"),
        ({"images": [{"file_id": "../../x"}]}, "images", "file_not_found"),
        ({"images": [{"image_url": ["x"]}]}, "images", "invalid_type"),
        ({"image": "data:image/png;base64,@@"}, "image", "invalid_base64_image"),
        ({"image": "data:nothing"}, "image", "invalid_base64_image"),
        ({"image": "data:,plain%20text"}, "image", "invalid_image"),
        ({"image": "/v1/images/img_" + "0" * 32 + "/content"}, "image", "content_not_found"),
        ({"image": "/v1/images/../../etc/passwd/content"}, "image", "invalid_image_url"),
        ({"image": [data_url(png())] * 17}, "image", "invalid_value"),
        ({"image": data_url(png()), "mask": "no picture"}, "mask", "invalid_image_url"),
        ({"image": data_url(png()), "mask": data_url(png())}, "mask", "invalid_value"),
        ({"image": data_url(png(size=(4, 4)))}, "image", "image_too_small"),
    ],
)  # fmt: skip
def test_what_means_no_picture_is_refused_by_name(server, body, param, code):
    status, named, told = error_of(server.post(EDITS, json={"prompt": "x", **body}))
    assert status in (400, 404)
    assert (named, told) == (param, code)
    assert inputs_left(server) == []


def test_names_of_files_are_never_paths(server):
    names = [
        "../../../evil.png",
        "/etc/cron.d/evil",
        "..\\..\\evil.png",
        "evil\0.png",
        "a" * 500,
        "",
        "CON",
        ".",
        "%2e%2e%2f",
    ]
    root = Path(server.config.data_dir).parent
    for name in names:
        parts = {"data": {"prompt": "x"}, "files": {"image": (name, png())}}
        assert server.post(EDITS, **parts).status_code == 200
    assert list(root.rglob("*evil*")) == []
    assert not os.path.exists("/etc/cron.d/evil")


HOSTILE = {
    "a header of 100,000 x 100,000": (lambda: png_of_size(100_000, 100_000), "image_too_large"),
    "400 million black pixels": (lambda: saved(Image.new("1", (20_000, 20_000))), "image_too_large"),
    "an animation": (
        lambda: saved(Image.new("L", (64, 48)), "WEBP", save_all=True, append_images=[Image.new("L", (64, 48), 255)]),
        "invalid_image",
    ),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "invalid_image"),
    "gif": (lambda: saved(Image.new("P", (64, 48)), "GIF"), "invalid_image"),
    "pdf": (lambda: saved(Image.new("RGB", (64, 48)), "PDF"), "invalid_image"),
    "mp4": (lambda: bytes.fromhex("0000001c6674797069736f6d") + bytes(200), "invalid_image"),
    "a cut-off png": (lambda: png()[:60], "invalid_image"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_uploads_are_judged_by_what_is_in_them(server, case):
    make, code = HOSTILE[case]
    answer = server.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", make(), "image/png")})
    assert error_of(answer) == (400, "image", code)
    assert inputs_left(server) == []


def test_of_a_picture_with_something_behind_it_only_the_pixels_come_to_the_worker(server):
    polyglot = png("lime") + b"PK\x03\x04<script>alert(1)</script>"
    answered = edit_in_background(server, data={"prompt": "hold"}, files={"image": polyglot})
    wait_until(lambda: server.engine.num_running == 1)
    (request,) = (server.engine.seen[job_id] for job_id in server.engine._jobs)
    content = Path(request.images[0]).read_bytes()
    server.engine.released.set()
    assert answered.result().status_code == 200
    assert Image.open(io.BytesIO(content)).getpixel((3, 3)) == (0, 255, 0)
    assert b"script" not in content


def test_no_file_is_written_where_a_client_says(server, tmp_path):
    wanted = tmp_path / "of-a-client"
    paths = {name: str(wanted) for name in ("output_path", "save_disk_path", "save_result_path", "perf_dump_path")}
    assert server.post(json={"prompt": "x", **paths}).status_code == 200
    assert server.post(EDITS, data={"prompt": "x", **paths}, files={"image": png()}).status_code == 200
    assert not wanted.exists()


def test_uploads_that_are_refused_leave_no_descriptor_open(server):
    def post(data: bytes) -> int:
        return server.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", data)}).status_code

    post(b"x" * 2_000_000)
    before = psutil.Process().num_fds()
    assert {post(b"x" * 2_000_000) for _ in range(20)} == {400}
    wait_until(lambda: psutil.Process().num_fds() <= before + 2)


@pytest.mark.parametrize("failing", ["make_folder", "sync_folder"])
def test_inputs_that_do_not_fit_on_the_disk_are_a_storage_failure_that_leaves_nothing(server, monkeypatch, failing):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(input_folders, failing, full)
        answer = server.post(EDITS, data={"prompt": "x"}, files={"image": png()})
    assert error_of(answer) == (502, None, "storage_failed")
    assert inputs_left(server) == []
    assert server.post(EDITS, data={"prompt": "x"}, files={"image": png()}).status_code == 200


def test_models_that_cannot_begin_at_a_picture_make_no_variations(server):
    answer = server.post("/v1/images/variations", files={"image": ("a.png", png())})
    assert error_of(answer) == (400, "image", "unsupported_by_model")


def test_variations_need_no_prompt_and_begin_at_the_picture(deploy):
    server = deploy(card=image_card(takes_strength=True))
    answer = server.client().images.create_variation(image=png(), n=2, response_format="b64_json")
    assert len(answer.data) == 2
    assert {(request.prompt, request.strength) for request in server.engine.seen.values()} == {("", VARIATION_STRENGTH)}


def edit_with_fidelity(server, form: str, fidelity: str):
    fields = {"prompt": "a cat", "input_fidelity": fidelity}
    if form == "json":
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        return server.post(EDITS, json=fields | {"image": url})
    return server.post(EDITS, data=fields, files={"image": ("a.png", png())})


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_input_fidelity_is_read_from_forms_and_json(deploy, form):
    server = deploy(card=image_card(tasks=("T2I", "I2I"), takes_strength=True, edit_strength=0.7))
    answer = edit_with_fidelity(server, form, "high")
    assert "x-photogram-ignored" not in answer.headers
    assert server.engine.seen[answer.json()["data"][0]["id"]].strength == pytest.approx(0.49)
    assert error_of(edit_with_fidelity(server, form, "medium")) == (400, "input_fidelity", "invalid_value")


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_input_fidelity_is_named_where_the_model_edits_in_its_own_way(server, form):
    assert edit_with_fidelity(server, form, "high").headers["x-photogram-ignored"] == "input_fidelity"
