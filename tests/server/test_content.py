"""`GET /v1/images/{id}/content`: files by unguessable ids, in ranges, after a restart."""

from __future__ import annotations

import base64
import re

import httpx
import pytest

from .fake_engine import FakeEngine


def make(server, **fields) -> list[dict]:
    return server.post(json={"prompt": "a cube", **fields}).json()["data"]


def path_of(image_id: str) -> str:
    return f"/v1/images/{image_id}/content"


def test_url_mode_gives_a_relative_url_that_serves_the_same_bytes(server):
    [item] = make(server, response_format="url", seed=4)
    assert item["url"] == path_of(item["id"])
    assert "b64_json" not in item
    [same] = make(server, seed=4)
    answer = server.get(item["url"])
    assert answer.content == base64.b64decode(same["b64_json"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'inline; filename="{item["id"]}.png"'
    assert server.get(item["url"].removeprefix("/v1")).content == answer.content


def test_head_tells_everything_but_the_bytes(server):
    [item] = make(server)
    whole, head = server.get(path_of(item["id"])), httpx.head(server.url + path_of(item["id"]))
    assert head.content == b""
    for name in ("content-length", "content-type", "etag", "accept-ranges"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=5-999999999", 5, None),
        ("Bytes=3-3", 3, 3),
    ],
)
def test_ranges(server, wanted, first, last):
    [item] = make(server)
    whole = server.get(path_of(item["id"])).content
    answer = server.get(path_of(item["id"]), headers={"range": wanted})
    expected = whole[first:] if last is None else whole[first : last + 1]
    assert (answer.status_code, answer.content) == (206, expected)
    start = first % len(whole)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"


@pytest.mark.parametrize("wanted", ["bytes=999999999-", "bytes=-0"])
def test_range_outside_the_file_is_416(server, wanted):
    [item] = make(server)
    size = len(server.get(path_of(item["id"])).content)
    answer = server.get(path_of(item["id"]), headers={"range": wanted})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{size}"
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize("wanted", ["lines=1-2", "bytes=a-b", "bytes=0-1,3-4", "bytes=9-3", "bytes=-", "bytes"])
def test_range_that_is_none_is_ignored(server, wanted):
    [item] = make(server)
    assert server.get(path_of(item["id"]), headers={"range": wanted}).status_code == 200


def test_etag_saves_the_second_download_and_guards_ranges(server):
    [item] = make(server)
    etag = server.get(path_of(item["id"])).headers["etag"]
    again = server.get(path_of(item["id"]), headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    ranged = {"range": "bytes=0-1", "if-range": etag}
    assert server.get(path_of(item["id"]), headers=ranged).status_code == 206
    assert server.get(path_of(item["id"]), headers={**ranged, "if-range": '"other"'}).status_code == 200


def test_variant_answers_the_kth_image_of_the_same_request(server):
    items = make(server, n=3, seed=7)
    for asked in items:
        for k, item in enumerate(items):
            answer = server.get(path_of(asked["id"]), params={"variant": k})
            assert answer.content == base64.b64decode(item["b64_json"])
    assert server.get(path_of(items[0]["id"]), params={"variant": 3}).status_code == 404
    for bad in ("-1", "x", "10"):
        answer = server.get(path_of(items[0]["id"]), params={"variant": bad})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "variant")


def test_ids_cannot_be_guessed(server):
    ids = {item["id"] for _ in range(3) for item in make(server, n=10, size="16x16")}
    assert len(ids) == 30
    assert all(re.fullmatch(r"img_[0-9a-f]{32}", image_id) for image_id in ids)


@pytest.mark.parametrize(
    "image_id",
    [
        "img_" + "0" * 32,
        "..",
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e",
        "img_%00",
        "x" * 5000,
        "img_%ff%fe",
        "*",
        "%25",
        "' or 1=1 --",
        "img\\..\\x",
    ],
)
def test_tricks_in_ids_are_404(server, image_id):
    answer = server.get(path_of(image_id))
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_picture_survives_a_restart(deploy):
    first = deploy()
    [item] = make(first, response_format="url")
    data, etag = first.get(item["url"]).content, first.get(item["url"]).headers["etag"]
    first.stop()
    second = deploy()
    answer = second.get(item["url"])
    assert (answer.content, answer.headers["etag"]) == (data, etag)


def test_jobs_of_a_killed_server_are_failed_at_the_next_start(deploy):
    first = deploy()
    make(first)
    first.stop()
    # What a server leaves that is killed in mid-job.
    import contextlib
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"{first.config.data_dir}/jobs.sqlite3")) as connection:
        connection.execute("update jobs set state = 'running', finished_at = null")
        connection.commit()
    second = deploy()
    [row] = second.rows()
    assert row[1:] == ("failed", "interrupted")
    answer = second.get(path_of(row[0]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "image_failed")


def test_a_picture_that_a_killed_server_left_without_its_row_saying_so_is_removed(deploy):
    first = deploy()
    make(first)
    first.stop()
    import contextlib
    import sqlite3
    from pathlib import Path

    # Killed when the file was lasting and the row said what it says from its acceptance on.
    with contextlib.closing(sqlite3.connect(f"{first.config.data_dir}/jobs.sqlite3")) as connection:
        connection.execute("update jobs set state = 'queued', started_at = null, finished_at = null, file_key = null")
        connection.commit()
    files = Path(first.config.data_dir) / "files"
    assert [path for path in files.rglob("*.png") if path.is_file()] != []
    second = deploy()
    [row] = second.rows()
    assert row[1:] == ("failed", "interrupted")
    assert [path for path in files.rglob("*.png") if path.is_file()] == []


def test_a_pictures_row_tells_at_its_end_all_that_became_known_on_its_way(deploy):
    import contextlib
    import sqlite3

    server = deploy()
    [item] = make(server, response_format="url")
    with contextlib.closing(sqlite3.connect(f"{server.config.data_dir}/jobs.sqlite3")) as connection:
        connection.row_factory = sqlite3.Row
        [row] = connection.execute("select * from jobs").fetchall()
    assert row["state"] == "completed"
    assert row["created_at"] <= row["started_at"] <= row["finished_at"]
    assert row["attempts"] == 1
    assert row["file_key"] == f"{row['job_id']}.png"
    assert row["content_type"] == "image/png"
    assert row["file_bytes"] == len(server.get(item["url"]).content)
    assert row["image_tokens"] > 0


def test_unfinished_and_failed_pictures_are_404_with_the_reason(deploy):
    server = deploy()
    server.post(json={"prompt": "fail:out_of_memory"})
    [row] = server.rows()
    answer = server.get(path_of(row[0]))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "image_failed"
    assert "no luck today" in answer.json()["error"]["message"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "hold"}, timeout=httpx.Timeout(5, read=0.3))
    from .conftest import wait_until

    wait_until(lambda: server.rows()[-1][1] == "cancelled")
    assert server.get(path_of(server.rows()[-1][0])).json()["error"]["code"] == "image_cancelled"


def test_file_that_is_gone_is_404(deploy):
    from pathlib import Path

    server = deploy()
    [item] = make(server)
    [file] = Path(server.config.data_dir).rglob(f"{item['id']}.png")
    file.unlink()
    answer = server.get(path_of(item["id"]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


def test_other_keys_pictures_are_404(deploy):
    server = deploy(api_key=("key-of-alice", "key-of-bob"))
    alice, bob = ({"authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))
    answer = server.post(json={"prompt": "a cube", "response_format": "url"}, headers=alice)
    url = answer.json()["data"][0]["url"]
    assert server.get(url, headers=alice).status_code == 200
    refused = server.get(url, headers=bob)
    unknown = server.get(path_of("img_" + "0" * 32), headers=bob)
    assert (refused.status_code, unknown.status_code) == (404, 404)
    assert refused.json()["error"]["code"] == unknown.json()["error"]["code"]


def test_store_holds_no_key(deploy):
    from pathlib import Path

    server = deploy(api_key=("key-of-alice",))
    server.post(json={"prompt": "a cube"}, headers={"authorization": "Bearer key-of-alice"})
    assert FakeEngine.__name__  # the rows are read from disk, not from the engine
    files = [path.read_bytes() for path in Path(server.config.data_dir).rglob("*") if path.is_file()]
    assert files
    assert not any(b"key-of-alice" in data for data in files)
