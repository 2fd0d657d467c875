"""The server as a process: start, signals, busy port, a model that can never be served."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from photogram.core.errors import ConfigError
from photogram.server.run import bind, url_of

from .conftest import wait_until

TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def process(data_dir: Path, *arguments: str, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "server.stand_alone", str(port), str(data_dir), *arguments]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
        running.stderr.close()


def url_from(running: subprocess.Popen[str]) -> str:
    url = running.stdout.readline().strip()
    assert url, running.stderr.read()
    return url


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/ready").status_code == 200


def test_health_is_answered_before_the_model_is_loaded(tmp_path):
    with process(tmp_path, "loading") as running:
        url = url_from(running)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        wait_until(lambda: httpx.get(f"{url}/ready").json().get("state") == "loading")


def test_model_that_can_never_be_served_ends_with_one_line_and_exit_code_2(tmp_path):
    with process(tmp_path, "loading", "--model-path '/nowhere': no such folder.") as running:
        _output, errors = running.communicate(timeout=20)
        assert running.returncode == 2
        assert errors.splitlines() == ["--model-path '/nowhere': no such folder."]


def test_sigterm_lets_running_jobs_finish_answers_503_meanwhile_and_exits_0(tmp_path):
    with process(tmp_path) as running:
        url = url_from(running)
        wait_until(lambda: is_ready(url))
        answers: list[httpx.Response] = []
        # Long enough that the signal comes in the middle, whatever the machine.
        body = {"prompt": "a slow cube", "size": "256x256", "n": 10, "steps": 20}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=60))
        )
        asking.start()
        with httpx.Client() as kept:
            wait_until(lambda: kept.get(f"{url}/server_info").json()["num_jobs"] == 10)
            running.send_signal(signal.SIGTERM)

            def refused() -> bool:
                answer = kept.post(f"{url}/v1/images/generations", json={"prompt": "a cube", "size": "16x16"})
                if answer.status_code == 200:
                    return False
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert kept.get(f"{url}/health").status_code == 200
                assert kept.get(f"{url}/ready").json()["state"] == "draining"
                return True

            wait_until(refused)
        asking.join()
        assert answers[0].status_code == 200
        assert len(answers[0].json()["data"]) == 10
        assert running.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_idle_server_ends_at_once_with_exit_code_0(tmp_path, sent):
    with process(tmp_path) as running:
        url = url_from(running)
        wait_until(lambda: is_ready(url))
        running.send_signal(sent)
        assert running.wait(20) == 0
        assert running.stderr.read() == ""


def test_second_signal_does_not_wait_for_running_jobs(tmp_path):
    with process(tmp_path) as running:
        url = url_from(running)
        wait_until(lambda: is_ready(url))
        body = {"prompt": "hold", "stream": True, "stream_progress": True}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: photogram.progress"
            running.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/ready").json()["state"] == "draining")
            running.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "event: error" in rest
        assert "shutting down" in rest[-2]
        assert running.wait(20) == 0


def ask_in_vain(url: str) -> None:
    with contextlib.suppress(httpx.TransportError):
        httpx.post(f"{url}/v1/images/generations", json={"prompt": "hold"})


def test_kill_9_leaves_a_store_that_the_next_server_can_use(tmp_path):
    with process(tmp_path) as running:
        url = url_from(running)
        wait_until(lambda: is_ready(url))
        made = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cube", "response_format": "url"})
        content = httpx.get(url + made.json()["data"][0]["url"]).content
        asking = threading.Thread(target=ask_in_vain, args=(url,))
        asking.start()
        wait_until(lambda: httpx.get(f"{url}/server_info").json()["num_jobs"] == 1)
        running.kill()
        asking.join()
    with process(tmp_path) as running:
        url = url_from(running)
        wait_until(lambda: is_ready(url))
        assert httpx.get(url + made.json()["data"][0]["url"]).content == content
        assert httpx.get(f"{url}/server_info").json()["num_jobs"] == 0


def test_busy_port_is_refused_by_name(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            bind("127.0.0.1", port)
        with process(tmp_path, port=port) as running:
            _, errors = running.communicate(timeout=20)
            assert running.returncode == 2
            assert len(errors.splitlines()) == 1


def test_two_servers_do_not_share_a_data_folder(tmp_path):
    with process(tmp_path) as running:
        url_from(running)
        wait_until((tmp_path / "lock").exists)
        with process(tmp_path) as second:
            _, errors = second.communicate(timeout=20)
            assert second.returncode == 2
            assert "another photogram server" in errors


def test_address_that_is_not_ours_is_refused():
    for host in ("203.0.113.7", "no such host"):
        with pytest.raises(ConfigError, match="--host"):
            bind(host, 0)


def test_url_names_an_address_that_a_browser_can_open():
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", None)):
        with bind(host, 0) as listener:
            port = listener.getsockname()[1]
            assert url_of(listener) in (f"http://{shown}:{port}", f"http://[::1]:{port}", f"http://127.0.0.1:{port}")
