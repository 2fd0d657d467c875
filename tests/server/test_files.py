"""`/v1/files` as OpenAI's SDK uses it, its bounds, and files as inputs by their ids."""

import io
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from .conftest import wait_until
from .test_inputs import EDITS, colours_of_inputs, edit_in_background, error_of, png


def stored(server) -> list[Path]:
    return list((Path(server.config.data_dir) / "uploads").rglob("*.bin"))


def test_sdk_creates_retrieves_lists_reads_and_deletes(deploy):
    client = deploy().client()
    data = png("navy")
    made = client.files.create(file=("my picture.png", data), purpose="vision")
    assert made.id.startswith("file_")
    assert (made.bytes, made.filename, made.purpose, made.object) == (len(data), "my picture.png", "vision", "file")
    assert client.files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.delete(made.id).deleted
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError) as raised:
        client.files.retrieve(made.id)
    assert raised.value.code == "file_not_found"


def test_lists_are_paged_in_both_orders_and_filtered(deploy):
    client = deploy().client()
    ids = [client.files.create(file=(f"{i}.png", png()), purpose="vision").id for i in range(5)]
    other = client.files.create(file=("x.bin", b"x"), purpose="user_data").id
    page = client.files.list(limit=2, order="asc")
    assert ([file.id for file in page.data], page.has_more) == (ids[:2], True)
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [*ids, other]
    assert [file.id for file in client.files.list()] == [other, *reversed(ids)]
    assert [file.id for file in client.files.list(purpose="user_data")] == [other]


def test_a_file_is_an_input_by_its_id_as_image_and_as_mask(deploy):
    server = deploy()
    client = server.client()
    mask = io.BytesIO()
    Image.new("RGBA", (64, 48)).save(mask, "PNG")
    picture = client.files.create(file=("a.png", png("lime")), purpose="vision").id
    mask_id = client.files.create(file=("m.png", mask.getvalue()), purpose="vision").id
    body = {"prompt": "hold", "images": [{"file_id": picture}], "mask": {"file_id": mask_id}}
    answer = edit_in_background(server, json=body)
    assert colours_of_inputs(server) == [(0, 255, 0)]
    assert answer.result().status_code == 200
    text = client.files.create(file=("a.txt", b"hello"), purpose="user_data").id
    refused = server.post(EDITS, json={"prompt": "x", "images": [{"file_id": text}]})
    assert error_of(refused) == (400, "images", "invalid_image")


def test_files_are_their_owners_alone(deploy):
    server = deploy(api_key=("sk-one", "sk-two"))
    mine, theirs = server.client(api_key="sk-one"), server.client(api_key="sk-two")
    file_id = mine.files.create(file=("a.png", png()), purpose="vision").id
    assert list(theirs.files.list()) == []
    for call in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file_id)
    with pytest.raises(openai.BadRequestError):
        theirs.files.list(after=file_id).data  # noqa: B018
    body = {"prompt": "x", "images": [{"file_id": file_id}]}
    refused = server.post(EDITS, json=body, headers={"authorization": "Bearer sk-two"})
    assert error_of(refused) == (404, "images", "file_not_found")
    assert mine.files.retrieve(file_id).id == file_id


def test_files_survive_a_restart_and_leftovers_do_not(deploy, tmp_path):
    first = deploy()
    file_id = first.client().files.create(file=("a.png", png()), purpose="vision").id
    first.stop()
    orphan = tmp_path / "data" / "uploads" / "ab" / f"file_abcd{'0' * 28}.bin"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"half")
    second = deploy()
    assert second.client().files.content(file_id).read() == png()
    assert [path.stem for path in stored(second)] == [file_id]


def test_expired_files_are_gone_for_clients_and_swept(deploy):
    server = deploy()
    made = server.client().files.create(
        file=("a.png", png()), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == pytest.approx(made.created_at + 3600, abs=1)
    # An hour cannot be waited for: the row is made older than it is.
    with closing(sqlite3.connect(Path(server.config.data_dir) / "jobs.sqlite3")) as database, database:
        database.execute("update uploads set expires_at = 1")
    assert error_of(server.get(f"/v1/files/{made.id}")) == (404, "file_id", "file_not_found")
    server.stop()
    later = deploy()
    wait_until(lambda: stored(later) == [])


def test_without_a_wish_files_are_kept_as_long_as_the_server_keeps_them(deploy):
    kept = deploy(keep_uploads="2h,1GB")
    made = kept.client().files.create(
        file=("a.png", png()), purpose="vision", expires_after={"anchor": "created_at", "seconds": 86400}
    )
    assert made.expires_at == pytest.approx(made.created_at + 7200, abs=1)


def test_bytes_are_bounded_for_each_owner(deploy):
    server = deploy(keep_uploads="1MB", api_key=("sk-one", "sk-two"))

    def upload(key: str) -> httpx.Response:
        parts = {"data": {"purpose": "user_data"}, "files": {"file": ("a.bin", b"x" * 400_000)}}
        return server.post("/v1/files", headers={"authorization": f"Bearer {key}"}, **parts)

    first = upload("sk-one")
    assert upload("sk-one").status_code == 200
    assert error_of(upload("sk-one")) == (400, "file", "too_many_files")
    assert upload("sk-two").status_code == 200
    assert len(stored(server)) == 3
    server.client(api_key="sk-one").files.delete(first.json()["id"])
    assert upload("sk-one").status_code == 200


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ({"data": {"purpose": "vision"}}, "file"),
        ({"files": {"file": ("a.png", b"x")}}, "purpose"),
        ({"data": {"purpose": "evil"}, "files": {"file": ("a.png", b"x")}}, "purpose"),
        ({"data": {"purpose": "vision"}, "files": {"file": ("a.png", b"")}}, "file"),
        ({"data": {"purpose": "vision", "expires_after": "soon"}, "files": {"file": ("a", b"x")}}, "expires_after"),
        (
            {"data": {"purpose": "vision", "expires_after[seconds]": "5"}, "files": {"file": ("a", b"x")}},
            "expires_after[seconds]",
        ),
        ({"json": {"purpose": "vision", "file": "text"}}, "file"),
    ],
)
def test_uploads_that_are_none_are_refused_by_name(server, parts, param):
    answer = server.post("/v1/files", **parts)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert stored(server) == []


def test_content_is_never_shown_as_what_its_client_says_it_is(server):
    page = b"<script>alert(1)</script>"
    made = server.client().files.create(file=("x.html", page, "text/html"), purpose="user_data")
    answer = server.get(f"/v1/files/{made.id}/content")
    assert answer.content == page
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"
    server.client().files.delete(made.id)


@pytest.mark.parametrize("file_id", ["..%2F..%2Fetc%2Fpasswd", "file_" + "0" * 32, "%00", "a" * 3000])
def test_ids_are_looked_up_and_never_paths(server, file_id):
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert server.get(path).status_code == 404
