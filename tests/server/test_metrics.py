"""The numbers at /metrics: read with Prometheus' own parser, from a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from photogram import __version__
from photogram.core.messages import Began, DeviceMemory, Vitals

from .conftest import Deployment, wait_until
from .fake_engine import video_card

EDIT_KEY, READ_KEY, ADMIN_KEY = "sk-editor", "sk-reader", "sk-admin"


class Page:
    """One page: ``page['name{label="value"}']``, labels in alphabetical order; what is not there counts 0."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.values: dict[str, float] = {}
        for sample in self._samples():
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in self.values, f"{key} is there twice"
            self.values[key] = sample.value

    def _samples(self) -> Iterator[Sample]:
        return (sample for family in self.families.values() for sample in family.samples)

    def __getitem__(self, key: str) -> float:
        return self.values.get(key, 0.0)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def labels(self, name: str) -> set[str]:
        """Every value of a label, whatever the metric."""
        return {sample.labels[name] for sample in self._samples() if name in sample.labels}


def page_of(server: Deployment) -> Page:
    answer = server.get("/metrics")
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


def page_with(server: Deployment, expected: dict[str, float]) -> Page:
    """Return the first page with all these values: what follows an answer is counted once it was sent."""
    page = page_of(server)

    def is_there() -> bool:
        nonlocal page
        page = page_of(server)
        return all(page[key] == value for key, value in expected.items())

    try:
        wait_until(is_there)
    except AssertionError:
        assert {key: page[key] for key in expected} == expected
        raise
    return page


def draw(server: Deployment, prompt: str = "a cube", **fields) -> httpx.Response:
    return server.post(json={"prompt": prompt, "size": "64x48", **fields})


def film(server: Deployment, prompt: str) -> str:
    answer = server.post("/v1/videos", json={"prompt": prompt, "num_frames": 5})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_pictures_are_counted_with_their_steps_their_phases_and_their_requests(deploy):
    server = deploy()
    before = page_of(server)
    assert before['photogram_jobs_finished_total{kind="image",state="completed"}'] == 0
    assert draw(server, n=2, steps=3).status_code == 200
    assert draw(server, steps=5).status_code == 200
    request = 'method="POST",route="/v1/images/generations"'
    page = page_with(
        server,
        {
            'photogram_jobs_finished_total{kind="image",state="completed"}': 3,
            "photogram_http_requests_active": 1,  # the page itself
            f'photogram_http_requests_total{{{request},status="200"}}': 2,
        },
    )
    assert page['photogram_jobs_accepted_total{kind="image"}'] == 3
    assert page['photogram_jobs_accepted_total{kind="video"}'] == 0
    assert page['photogram_steps_total{kind="image"}'] == 2 * 3 + 5
    assert page['photogram_jobs{kind="image",state="running"}'] == 0
    for phase in ("queued", "denoise", "file"):
        assert page[f'photogram_job_phase_seconds_count{{kind="image",phase="{phase}"}}'] == 3
    assert page['photogram_job_duration_seconds_count{kind="image"}'] == 3
    assert page['photogram_job_duration_seconds_bucket{kind="image",le="+Inf"}'] == 3
    whole_s = page['photogram_job_duration_seconds_sum{kind="image"}']
    phases_s = sum(value for key, value in page.values.items() if key.startswith("photogram_job_phase_seconds_sum"))
    assert 0 < phases_s <= whole_s
    assert page[f"photogram_http_request_duration_seconds_count{{{request}}}"] == 2
    assert page[f"photogram_http_request_duration_seconds_sum{{{request}}}"] > 0


def test_failures_are_counted_by_their_error(deploy):
    server = deploy()
    assert draw(server, "fail:out_of_memory", steps=4).status_code >= 500
    page = page_with(server, {'photogram_jobs_finished_total{kind="image",state="failed"}': 1})
    assert page['photogram_job_failures_total{code="out_of_memory",kind="image"}'] == 1
    assert page['photogram_steps_total{kind="image"}'] == 2  # it fails half-way
    assert page['photogram_jobs_finished_total{kind="image",state="completed"}'] == 0
    assert page['photogram_job_duration_seconds_count{kind="image"}'] == 0
    assert page['photogram_job_phase_seconds_count{kind="image",phase="denoise"}'] == 1


def test_what_waits_runs_and_is_cancelled_is_told_apart(deploy):
    server = deploy(card=video_card())
    server.engine.max_running = 1
    first, second, third = (film(server, "hold") for _ in range(3))
    page = page_with(
        server, {'photogram_jobs{kind="video",state="running"}': 1, 'photogram_jobs{kind="video",state="queued"}': 2}
    )
    oldest_s = page["photogram_queue_oldest_seconds"]
    assert oldest_s > 0
    assert page_of(server)["photogram_queue_oldest_seconds"] > oldest_s
    assert server.post(f"/v1/videos/{third}/cancel").status_code == 200
    httpx.delete(f"{server.url}/v1/videos/{second}").raise_for_status()
    page = page_with(
        server,
        {
            'photogram_jobs_finished_total{kind="video",state="cancelled"}': 2,
            'photogram_jobs{kind="video",state="queued"}': 0,
        },
    )
    assert page["photogram_queue_oldest_seconds"] == 0
    server.engine.released.set()
    page = page_with(server, {'photogram_jobs_finished_total{kind="video",state="completed"}': 1})
    assert page['photogram_jobs_accepted_total{kind="video"}'] == 3
    assert page['photogram_jobs{kind="video",state="running"}'] == 0
    assert server.get(f"/v1/videos/{first}").json()["status"] == "completed"


def test_what_clients_invent_becomes_no_label(deploy):
    server = deploy()
    for number in range(3):
        assert server.get(f"/nope/{number}").status_code == 404
        assert server.get(f"/v1/videos/video_{number}").status_code == 404
        assert server.get(f"/v1/models/some/model-{number}").status_code == 404
    assert httpx.delete(f"{server.url}/v1/images/generations").status_code == 405
    page = page_with(
        server,
        {
            'photogram_http_requests_total{method="GET",route="none",status="404"}': 3,
            'photogram_http_requests_total{method="GET",route="/v1/videos/{video_id}",status="404"}': 3,
            'photogram_http_requests_total{method="GET",route="/v1/models/{model}",status="404"}': 3,
            'photogram_http_requests_total{method="DELETE",route="none",status="405"}': 1,
        },
    )
    assert not [route for route in page.labels("route") if re.search(r"nope|video_\d|model-\d", route)]


def test_a_trailing_slash_does_not_make_another_route(deploy):
    server = deploy()
    assert server.get("/v1/models/").status_code == 200
    page_with(server, {'photogram_http_requests_total{method="GET",route="/v1/models",status="200"}': 1})


def test_passes_switches_and_memory_of_each_worker_are_told(deploy):
    server = deploy()
    figures = server.engine.figures[0]
    assert 'photogram_device_memory_bytes{kind="total",worker="0"}' not in page_of(server)
    for num_jobs in (1, 1, 3, 8):
        figures.began(Began(tuple(f"job-{i}" for i in range(num_jobs)), "transformer", None))
    figures.told(Vitals(2, DeviceMemory(allocated_bytes=5, reserved_bytes=7, total_bytes=80_000_000_000)))
    page = page_of(server)
    passes = 'module="transformer",worker="0"'
    counts = [
        page[f'photogram_pass_calls_bucket{{le="{bound}",{passes}}}'] for bound in ("1.0", "2.0", "4.0", "8.0", "+Inf")
    ]
    assert counts == [2, 2, 3, 4, 4]
    assert page[f"photogram_pass_calls_sum{{{passes}}}"] == 13
    assert page['photogram_lora_switches_total{worker="0"}'] == 2
    assert page['photogram_device_memory_bytes{kind="reserved",worker="0"}'] == 7
    assert page['photogram_device_memory_bytes{kind="total",worker="0"}'] == 80e9
    figures.ended()
    figures.told(Vitals(1, None))
    page = page_of(server)
    assert page['photogram_lora_switches_total{worker="0"}'] == 3
    assert 'photogram_device_memory_bytes{kind="total",worker="0"}' not in page


def test_the_server_says_what_it_is_and_whether_it_is_ready(deploy):
    server = deploy(state="loading")
    page = page_of(server)
    assert page["photogram_ready"] == 0
    assert "photogram_model" not in page.families
    server.engine.state = "ready"
    page = page_of(server)
    assert page["photogram_ready"] == 1
    [build] = page.families["photogram_build_info"].samples
    assert (build.value, build.labels["version"]) == (1, __version__)
    [model] = page.families["photogram_model_info"].samples
    assert model.labels["model"] == "acme/painter-1"
    assert page["photogram_uptime_seconds"] > 0
    assert page["photogram_worker_restarts_total"] == 0
    assert page["process_resident_memory_bytes"] > 1e6


def test_every_metric_is_explained_and_named_as_prometheus_wants(deploy):
    server = deploy()
    draw(server)
    families = page_of(server).families
    assert len(families) > 15
    assert [name for name, family in families.items() if not family.documentation] == []
    assert [name for name in families if not re.fullmatch(r"(photogram|process)_[a-z_]+", name)] == []


def test_openmetrics_is_spoken_to_who_asks_for_it(deploy):
    server = deploy()
    draw(server)
    plain = server.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    answer = server.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert {family.name for family in parse_openmetrics(answer.text)} >= {"photogram_jobs_finished", "photogram_build"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"": 200, "other": 200}),
        ({"api_key": (READ_KEY, EDIT_KEY)}, {"": 401, "other": 401, READ_KEY: 200, EDIT_KEY: 200}),
        ({"api_key": (READ_KEY,), "admin_api_key": ADMIN_KEY}, {"": 401, READ_KEY: 403, ADMIN_KEY: 200}),
        ({"admin_api_key": ADMIN_KEY}, {"": 401, "other": 401, ADMIN_KEY: 200}),
        ({"api_key": (READ_KEY,), "admin_api_key": ADMIN_KEY, "open_metrics": True}, {"": 200, "other": 200}),
    ],
    ids=["no keys", "keys", "keys and an admin key", "an admin key alone", "open"],
)
def test_the_numbers_need_the_most_powerful_key_there_is_unless_they_are_open(deploy, settings, expected):
    server = deploy(**settings)

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return server.get("/metrics", headers=headers).status_code

    assert {key: status(key) for key in expected} == expected
    if "api_key" in settings:
        assert draw(server).status_code == 401


def test_keys_prompts_and_ids_are_nowhere_on_the_page(deploy):
    server = deploy(api_key=(READ_KEY,), card=video_card())
    headers = {"authorization": f"Bearer {READ_KEY}", "x-request-id": "req-of-mine"}
    answer = server.post(
        "/v1/videos", json={"prompt": "hold the unspeakable", "num_frames": 5, "user": "alice"}, headers=headers
    )
    text = server.get("/metrics", headers=headers).text
    for secret in (answer.json()["id"], "unspeakable", "alice", READ_KEY, "req-of-mine"):
        assert secret not in text
