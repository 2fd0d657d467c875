"""The error table, through the official SDK and raw HTTP. One shape for every error is the specification."""

from __future__ import annotations

import socket
import threading

import httpx
import openai
import pytest

from .conftest import wait_until

URL = "/v1/images/generations"


def assert_our_shape(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error", "detail"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["detail"] == body["error"]["message"]
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "many"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": [1]}, "n"),
        ({"n": 10**30}, "n"),
        ({"size": "1000000000x1000000000"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "8x64"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"size": "64"}, "size"),
        ({"size": "8192x4096"}, "size"),
        ({"size": "16x4096"}, "size"),
        ({"size": 512}, "size"),
        ({"size": "64x64", "extra_body": {"width": 128}}, "size"),
        ({"extra_body": {"width": 128}}, "height"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"steps": 10**9}}, "steps"),
        ({"extra_body": {"steps": 3, "num_inference_steps": 4}}, "steps"),
        ({"extra_body": {"guidance_scale": -1}}, "guidance_scale"),
        ({"extra_body": {"guidance_scale": "nan"}}, "guidance_scale"),
        ({"extra_body": {"guidance_scale": "Infinity"}}, "guidance_scale"),
        ({"extra_body": {"cfg_scale": 1e300}}, "cfg_scale"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"seed": 2**63 - 1}, "n": 2}, "seed"),
        ({"extra_body": {"priority": 11}}, "priority"),
        ({"extra_body": {"eta": "much"}}, "eta"),
        ({"extra_body": {"sigmas": "[1, 2"}}, "sigmas"),
        ({"extra_body": {"extra_params": "[1]"}}, "extra_params"),
        ({"extra_body": {"negative_prompt": 5}}, "negative_prompt"),
        ({"extra_body": {"deterministic": "perhaps"}}, "deterministic"),
        ({"extra_body": {"task_type": "T2V"}}, "task_type"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"extra_body": {"output-quality": "best"}}, "output-quality"),
        ({"response_format": "xml"}, "response_format"),
        ({"quality": "ultra"}, "quality"),
        ({"extra_body": {"quality_mode": "lossless"}}, "quality_mode"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"model": "m" * 600}, "model"),
    ],
)
def test_bad_parameter_is_a_bad_request_that_names_it(server, fields, param):
    num_seen = len(server.engine.seen)
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().images.generate(prompt="a cube", **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code
    assert caught.value.request_id
    assert len(server.engine.seen) == num_seen


@pytest.mark.parametrize("prompt", [None, "", 5, ["a"], {"a": 1}, "nul \0 in it", "x" * 32_001, "x" * 10_000_000])
def test_prompt_is_required_and_bounded(server, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().images.generate(prompt=prompt)
    assert caught.value.param == "prompt"


def test_longest_prompt_is_fine(server):
    server.client().images.generate(prompt="ü" * 32_000, size="16x16")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"prompt"',
        b"null",
        b"12",
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": Infinity}',
        b'{"prompt": "a", "guidance_scale": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": ' + b'{"a":' * 50_000,
        b"prompt=a",
        b"\x00",
        b"{'prompt': 'a'}",
    ],
)
def test_malformed_json_is_a_bad_request(server, body):
    answer = server.post(content=body, headers={"content-type": "application/json"})
    assert_our_shape(answer, 400, code="invalid_json")


def test_empty_body_misses_the_prompt(server):
    assert_our_shape(server.post(), 400, "prompt", "missing_required_parameter")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary here"),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\ncut'),
        ("multipart/form-data; boundary=b", b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--b--\r\n',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b--"),
        ("application/x-www-form-urlencoded", b"prompt=%ff"),
        ("application/x-www-form-urlencoded", b"a=1&" * 1000),
        ("application/x-www-form-urlencoded", b"prompt=a&prompt=b"),
        ("application/x-www-form-urlencoded", b"prompt=a&prompt[b]=c"),
        ("application/x-www-form-urlencoded", b"prompt=a&x[a][b][c][d][e]=c"),
    ],
)
def test_malformed_form_is_a_bad_request(server, content_type, body):
    answer = server.post(content=body, headers={"content-type": content_type})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_too_many_parts_and_too_many_files(server):
    answer = server.post(files=[(f"field{i}", (None, "x")) for i in range(600)])
    assert "512" in assert_our_shape(answer, 400)
    answer = server.post(files=[("image", (f"{i}.png", b"x")) for i in range(20)])
    assert "17" in assert_our_shape(answer, 400, "image")


def test_body_beyond_the_limit_is_refused_before_it_is_read(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as client:
        client.sendall(b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert b"413" in client.recv(1000).split(b"\r\n")[0]
    for chunks in (b"x" * (33 << 20), (b"x" * (1 << 20) for _ in range(33))):
        try:
            answer = server.post(content=chunks, headers={"content-type": "application/json"})
        except httpx.WriteError:
            continue
        assert_our_shape(answer, 413, code="request_too_large")


def test_upload_beyond_the_limit_is_refused(deploy):
    server = deploy(max_upload_mb=1)
    answer = server.post(data={"prompt": "a"}, files={"image": ("a.png", b"x" * 1_000_001)})
    assert "1000000" in assert_our_shape(answer, 413, "image")


@pytest.mark.parametrize(
    "path", ["/v1/unknown", "/nothing", "/v1/images", "/v1//images/generations", "/v1/images/../x/y"]
)
def test_unknown_route(server, path):
    assert_our_shape(server.get(path), 404, code="unknown_url")


def test_unknown_route_through_the_sdk(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().get("/frobnicate", cast_to=object)
    assert caught.value.code == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", URL), ("DELETE", URL), ("POST", "/health"), ("PUT", "/v1/models"), ("POST", "/")]
)
def test_wrong_method_names_the_right_ones(server, method, path):
    answer = httpx.request(method, server.url + path)
    assert_our_shape(answer, 405, code="method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("generation_failed", 500, "false"),
        ("out_of_memory", 507, "false"),
        ("timeout", 504, "false"),
        ("engine_unavailable", 503, None),
        ("invalid_value", 400, None),
        ("never_heard_of", 500, "false"),
    ],
)
def test_failures_of_a_job_are_answered_with_their_own_status(deploy, code, status, retry):
    server = deploy()
    answer = server.post(json={"prompt": f"fail:{code}"})
    assert "no luck today" in assert_our_shape(answer, status, code=code)
    assert answer.headers.get("x-should-retry") == retry
    assert ("retry-after" in answer.headers) == (status == 503)
    [row] = server.rows()
    assert row[1:] == ("failed", code)
    assert server.post(json={"prompt": "a cube"}).status_code == 200


def test_sdk_does_not_send_a_deterministic_failure_again(deploy):
    server = deploy()
    with pytest.raises(openai.InternalServerError):
        server.client(max_retries=2).images.generate(prompt="fail:out_of_memory")
    assert len(server.rows()) == 1


def test_one_failure_of_n_fails_the_request_and_ends_the_others(deploy):
    server = deploy()
    answer = server.post(json={"prompt": "fail:generation_failed", "n": 3})
    assert_our_shape(answer, 500)
    wait_until(lambda: {state for _, state, _ in server.rows()} <= {"failed", "cancelled"})


def test_frames_that_are_no_picture_fail_the_job_and_leave_nothing(deploy):
    server = deploy()
    assert_our_shape(server.post(json={"prompt": "explode"}), 500)
    assert server.rows()[0][1] == "failed"
    wait_until(lambda: server.leftover_frames() == [])


def test_full_queue_is_429_with_a_time_to_come_back(deploy):
    server = deploy(max_queue=2)
    holders = [threading.Thread(target=server.post, kwargs={"json": {"prompt": "hold"}}) for _ in range(2)]
    for holder in holders:
        holder.start()
    wait_until(lambda: server.engine.num_running == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        server.client().images.generate(prompt="a cube")
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
    server.engine.released.set()
    for holder in holders:
        holder.join()
    assert server.post(json={"prompt": "a cube", "n": 2}).status_code == 200
    assert_our_shape(server.post(json={"prompt": "a cube", "n": 3}), 400, "n")


def test_before_the_model_is_loaded_everything_is_503_but_life(deploy):
    server = deploy(state="loading")
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().images.generate(prompt="a cube")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for path in ("/models", "/v1/models", "/model_info"):
        assert_our_shape(server.get(path), 503)
    assert server.get("/health").json() == {"status": "ok"}
    ready = server.get("/ready")
    assert (ready.status_code, ready.json()["state"]) == (503, "loading")
    server.engine.state = "ready"
    wait_until(lambda: server.get("/ready").status_code == 200)
    assert server.post(json={"prompt": "a cube"}).status_code == 200


def test_engine_that_is_lost_for_good_is_503(deploy):
    server = deploy()
    server.engine.state = "failed"
    assert_our_shape(server.post(json={"prompt": "a cube"}), 503)
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 503


def test_job_over_its_time_is_504_and_is_ended(deploy):
    server = deploy(request_timeout_s=0.2)
    answer = server.post(json={"prompt": "hold"})
    assert_our_shape(answer, 504, code="timeout")
    assert answer.headers["x-should-retry"] == "false"
    wait_until(lambda: len(server.engine.cancelled) == 1)
    assert server.rows()[0][1:] == ("failed", "timeout")
    wait_until(lambda: server.leftover_frames() == [])


def test_unforeseen_fault_is_500_without_its_text_and_is_logged(deploy, caplog, monkeypatch):
    server = deploy()

    def broken(request, listener):
        raise KeyError("a secret of the house")

    monkeypatch.setattr(server.engine, "submit", broken)
    answer = server.post(json={"prompt": "a cube"})
    assert "secret" not in assert_our_shape(answer, 500)
    assert "a secret of the house" in caplog.text
    assert server.rows()[0][1] == "failed"


def test_unforeseen_fault_of_a_route_is_500_with_its_request_id(deploy, caplog, monkeypatch):
    server = deploy()
    monkeypatch.setattr(type(server.engine), "status", property(lambda self: 1 / 0))
    answer = server.get("/ready", headers={"x-request-id": "mine-1"})
    assert "mine-1" in assert_our_shape(answer, 500, code="internal_error")
    assert "ZeroDivisionError" in caplog.text
    assert "mine-1" in caplog.text


def test_store_that_cannot_be_written_is_502_and_nothing_is_drawn(deploy, monkeypatch):
    from photogram.core.errors import StorageFailed
    from photogram.jobs.store import JobStore

    async def refuse(self, records):
        raise StorageFailed("the job store failed: disk full.")

    server = deploy(max_queue=1)
    monkeypatch.setattr(JobStore, "create", refuse)
    for _ in range(3):
        assert_our_shape(server.post(json={"prompt": "a cube"}), 502, code="storage_failed")
    assert server.engine.seen == {}
    monkeypatch.undo()
    assert server.post(json={"prompt": "a cube"}).status_code == 200


def test_storage_that_cannot_be_written_fails_the_job(deploy, monkeypatch):
    from photogram.core.errors import StorageFailed
    from photogram.storage.local import LocalStorage

    async def refuse(self, key, data, content_type):
        raise StorageFailed("no space left.")

    server = deploy()
    monkeypatch.setattr(LocalStorage, "put", refuse)
    assert_our_shape(server.post(json={"prompt": "a cube"}), 502, code="storage_failed")
    assert server.rows()[0][1:] == ("failed", "storage_failed")


def test_client_that_stops_sending_is_told_so(deploy, monkeypatch):
    from photogram.server.forms import BodyLimits

    monkeypatch.setattr(
        BodyLimits.__init__, "__kwdefaults__", {**BodyLimits.__init__.__kwdefaults__, "chunk_gap_s": 0.2}
    )
    server = deploy()
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as client:
        client.sendall(b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert b"408" in client.recv(1000).split(b"\r\n")[0]


def test_client_that_hangs_up_ends_its_jobs(deploy):
    server = deploy()
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as client:
        body = b'{"prompt": "hold", "n": 2}'
        client.sendall(
            b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: server.engine.num_running == 2)
    wait_until(lambda: server.engine.num_running == 0)
    wait_until(lambda: [row[1] for row in server.rows()] == ["cancelled", "cancelled"])
    assert server.get("/server_info").json()["num_jobs"] == 0


def test_fifty_clients_that_hang_up_leave_nothing_behind(deploy):
    server = deploy(max_queue=10)
    for _ in range(50):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + URL, json={"prompt": "hold"}, timeout=httpx.Timeout(5, read=0.02))
    wait_until(lambda: server.engine.num_running == 0)
    wait_until(lambda: server.get("/server_info").json()["num_jobs"] == 0)
    assert {row[1] for row in server.rows()} <= {"cancelled"}
    assert server.leftover_frames() == []
