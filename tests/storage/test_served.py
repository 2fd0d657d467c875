"""A server whose finished files go to a real S3 server: signed URLs in answers, and /content as ever."""

import re
from pathlib import Path

import httpx
import pytest

from server.conftest import deploy, wait_until  # noqa: F401 - a fixture

EDIT_AND_URL = {"prompt": "x", "size": "64x48", "response_format": "url"}


@pytest.fixture
def server(deploy, weed, monkeypatch):  # noqa: F811
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    return deploy(storage="s3://pictures/served")


def test_answers_have_signed_urls_and_content_still_works(server, weed):
    answer = server.post(json={**EDIT_AND_URL, "n": 2, "output_format": "webp"}).json()
    for item in answer["data"]:
        assert item["url"].startswith(f"{weed.endpoint}/pictures/served/img_")
        signed = httpx.get(item["url"])
        assert (signed.status_code, signed.headers["content-type"]) == (200, "image/webp")
        content = server.get(f"/v1/images/{item['id']}/content")
        assert content.content == signed.content
        part = server.get(f"/v1/images/{item['id']}/content", headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, signed.content[10:20])


def test_a_picture_in_the_store_is_an_input_by_its_path(server):
    item = server.post(json=EDIT_AND_URL).json()["data"][0]
    body = {"prompt": "x", "url": f"/v1/images/{item['id']}/content"}
    assert server.post("/v1/images/edits", json=body).status_code == 200


def test_while_the_store_hangs_pictures_are_made_and_served_from_here(server, weed):
    weed.pause()
    try:
        item = server.post(json=EDIT_AND_URL).json()["data"][0]
        assert re.fullmatch(r"/v1/images/img_[0-9a-f]{32}/content", item["url"])
        assert server.get(item["url"]).status_code == 200
    finally:
        weed.resume()
    files = Path(server.config.data_dir) / "files"
    wait_until(lambda: not list(files.rglob("img_*")), 60)
    assert server.get(item["url"]).status_code == 200


def test_signed_urls_can_be_turned_off(deploy, weed, monkeypatch):  # noqa: F811
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    server = deploy(storage="s3://pictures/served", presigned_url_seconds=0)
    assert server.post(json=EDIT_AND_URL).json()["data"][0]["url"].startswith("/v1/images/")
