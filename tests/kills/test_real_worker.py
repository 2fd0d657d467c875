"""`kill -9` of the host or of the real worker while the built-in video model makes clips: what was promised holds."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from .host import NOBODY, POINTS
from .host_process import Host, wait_for_the_end_of_all
from .rows import FINAL, Rows, check_nothing_is_left_over, unfinished

MODEL = "demo-video"
# As little as the model draws: a clip takes about a second, the start of a worker several.
STEPS = 3
SETTINGS = {
    "prompt": "a red circle moves to the right",
    "size": "64x48",
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "deterministic": True,
    "webhook_url": f"http://{NOBODY}/",
}
SEEDS = (1, 2)
LIFE_S = 2.5  # about what two clips take
LOAD_S = 4.0  # about what a worker takes to load
WORKER_MOMENTS = ("accepted", "loading", "any", *(f"step {step}" for step in range(1, STEPS + 1)))
# Of a point of the host: passed once for each clip, or for each step of each.
PASSAGES = dict.fromkeys(POINTS, 2) | {"step": 2 * (STEPS + 1)}


@dataclass
class Clip:
    """A clip that was asked for under a key, and the id that its client was told."""

    seed: int
    key: str
    told: str | None = None

    def ask(self, url: str) -> None:
        """Ask once. A client whose server dies knows nothing, and may ask again."""
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(
                f"{url}/v1/videos",
                json=SETTINGS | {"seed": self.seed},
                headers={"Idempotency-Key": self.key},
                timeout=60,
            )
            if answer.status_code != 503:  # while it stops or loads
                assert answer.status_code == 200, answer.text
                assert self.told in (None, answer.json()["id"]), "two clips under one key"
                self.told = answer.json()["id"]


class Kills:
    """Kills on one data folder, and what every client was told on the way."""

    def __init__(self, data: Path, draw: random.Random) -> None:
        self.data = data
        self.clips: list[Clip] = []
        self.fell: Counter[str] = Counter()
        self._draw = draw
        self._rows = Rows()

    def start(self, point: str = "none", passage: int = 1) -> Host:
        return Host(self.data, point, passage, MODEL)

    def read(self) -> list[sqlite3.Row]:
        rows = self._rows.read(self.data)
        lost = {clip.told for clip in self.clips if clip.told is not None} - {row["job_id"] for row in rows}
        assert not lost, "clips that were promised are not in the store"
        return rows

    def ask(self, host: Host) -> None:
        """Ask for two more clips, and once more for those whose promise did not arrive."""
        for _ in range(2):
            self.clips.append(Clip(self._draw.choice(SEEDS), f"key-{len(self.clips)}"))
        for clip in self.clips:
            if clip.told is None:
                clip.ask(host.url)

    def wait_until_over(self, host: Host, within_s: float = 120) -> None:
        """Wait until every clip has ended, or the host has."""
        deadline = time.monotonic() + within_s
        while host.is_alive and any(row["state"] not in FINAL for row in self.read()):
            assert time.monotonic() < deadline, "not every clip ends"
            time.sleep(0.02)

    def end_of_the_host(self, host: Host, moment: str) -> None:
        host.kill()
        found = self.read()
        self.fell[f"host: {moment}" if moment != "any" else f"host: any ({unfinished(found)})"] += 1
        wait_for_the_end_of_all(self.data)

    def kill_at(self, point: str) -> None:
        """Let a host end itself at a passage of the point."""
        host = self.start(point, self._draw.randint(1, PASSAGES[point]))
        self.ask(host)
        self.wait_until_over(host)
        self.end_of_the_host(host, "any" if host.is_alive else point)

    def kill_workers(self, host: Host, moments: Sequence[str]) -> None:
        """Kill a worker at each of the moments under one host, and the host at last."""
        for moment in moments:
            self._kill_worker(host, moment)
        self.ask(host)
        time.sleep(self._draw.uniform(0, LIFE_S))
        self.end_of_the_host(host, "any")

    def _kill_worker(self, host: Host, moment: str) -> None:
        self.ask(host)
        if moment == "loading":
            _end_worker(host)
            self.fell["worker: accepted"] += 1
            time.sleep(self._draw.uniform(0, LOAD_S))
        elif moment.startswith("step"):
            moment = f"step {self._follow(host, int(moment.removeprefix('step ')))}"
        elif moment == "any":
            time.sleep(self._draw.uniform(0, LIFE_S))
        _end_worker(host)
        self.fell[f"worker: {moment}" if moment != "any" else f"worker: any ({unfinished(self.read())})"] += 1
        host.wait_ready()

    def _follow(self, host: Host, step: int) -> str:
        """Follow the last clip up to a step; return how far it was."""
        with httpx.stream("GET", f"{host.url}/v1/videos/{self.clips[-1].told}/events", timeout=120) as answer:
            for line in answer.iter_lines():
                told = json.loads(line[6:]) if line.startswith("data: ") else {}
                if told.get("phase") == "denoise" and told["step"] >= step:
                    return str(told["step"])
        return "over"


def _end_worker(host: Host) -> None:
    """Kill the worker, and return when the host knows."""
    before = _num_restarts(host)
    deadline = time.monotonic() + 60
    while (worker := host.worker()) is None:
        assert time.monotonic() < deadline, "there is no worker"
        time.sleep(0.01)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.kill()
    while _num_restarts(host) == before:
        assert time.monotonic() < deadline, "the host does not notice that its worker is dead"
        time.sleep(0.01)


def _num_restarts(host: Host) -> int:
    return httpx.get(f"{host.url}/ready", timeout=30).json()["num_restarts"]


def drawn_in_peace(host: Host) -> dict[int, bytes]:
    """Return the file of each seed."""
    files = {}
    for seed in SEEDS:
        answer = httpx.post(f"{host.url}/v1/videos/sync", json=SETTINGS | {"seed": seed}, timeout=120)
        assert answer.status_code == 200, answer.text
        files[seed] = answer.content
    return files


def check_all(kills: Kills, expected: dict[int, bytes]) -> Counter[str]:
    """Let a last host finish everything, and compare with what was promised; return how the clips ended."""
    host = kills.start()
    for clip in kills.clips:
        clip.ask(host.url)
    kills.wait_until_over(host)
    rows = kills.read()
    of_id = {row["job_id"]: row for row in rows}
    ended: Counter[str] = Counter()
    for clip in kills.clips:
        row = of_id[clip.told]
        ended[row["error_code"] or row["state"]] += 1
        if row["state"] == "completed":
            content = httpx.get(f"{host.url}/v1/videos/{clip.told}/content", timeout=60).content
            assert content == expected[clip.seed], "another clip than the seed's"
        else:
            # It was running when its host died five times, or when two workers of one host did.
            assert row["error_code"] in ("interrupted", "engine_unavailable")
            assert row["error_message"]
            assert row["error_code"] != "interrupted" or row["interruptions"] == 5
    assert Counter(row["idempotency_key"] for row in rows if row["idempotency_key"]) == Counter(
        clip.key for clip in kills.clips
    )
    assert ended["completed"] > len(kills.clips) / 2
    host.stop()
    with contextlib.closing(sqlite3.connect(kills.data / "jobs.sqlite3")) as connection:
        announced = Counter(job_id for (job_id,) in connection.execute("SELECT job_id FROM deliveries"))
    assert announced == Counter(list(of_id)), "an end was not announced, or not once"
    wait_for_the_end_of_all(kills.data)
    check_nothing_is_left_over(kills.data, rows)
    return ended


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_clips_of_the_real_worker_survive_every_kill_with_the_frames_of_their_seed(tmp_path, capsys):
    draw = random.Random(4)
    kills = Kills(tmp_path, draw)
    host = kills.start()
    expected = drawn_in_peace(host)
    moments = draw.sample(WORKER_MOMENTS, len(WORKER_MOMENTS))
    kills.kill_workers(host, moments[:3])
    lives = [*POINTS, "step", "step", "workers"]
    draw.shuffle(lives)
    for life in lives:
        if life == "workers":
            kills.kill_workers(kills.start(), moments[3:])
        else:
            kills.kill_at(life)
    ended = check_all(kills, expected)
    told = "\n".join(f"{number:4d}  {where}" for where, number in sorted(kills.fell.items()))
    with capsys.disabled():
        print(f"\nkills fell here:\n{told}\nand {len(kills.clips)} clips ended so: {dict(ended)}")
    assert sum(kills.fell.values()) >= 20
