"""`kill -9` of the host at any moment of a job's life, again and again on one data folder: what was promised holds.

The worker is a stand-in that speaks the real wire protocol; the host, its store and its files are the real ones.
"""

from __future__ import annotations

import base64
import contextlib
import io
import random
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from .host import POINTS
from .host_process import Host, wait_for_the_end_of_all
from .rows import FINAL, Rows, check_nothing_is_left_over, unfinished


@dataclass
class Asked:
    """One request and what its client was told: the id and the pixels of its picture."""

    seed: int
    key: str | None
    is_edit: bool
    told: tuple[str, bytes] | None = None
    failure: str | None = None

    def send(self, url: str) -> None:
        """Ask once. No answer is no answer: the client of a dead server knows nothing."""
        headers = {"Idempotency-Key": self.key} if self.key else {}
        fields = {"prompt": "a cube", "seed": str(self.seed), "size": "64x64"}
        with contextlib.suppress(httpx.TransportError):
            if self.is_edit:
                files = {"image": ("a.png", _picture(), "image/png")}
                answer = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, headers=headers, timeout=30)
            else:
                answer = httpx.post(f"{url}/v1/images/generations", json=fields, headers=headers, timeout=30)
            if answer.status_code == 200:
                item = answer.json()["data"][0]
                told = (item["id"], _pixels(base64.b64decode(item["b64_json"])).tobytes())
                assert self.told in (None, told), "two answers to one request"
                self.told = told
            elif answer.status_code != 503:  # while it loads
                self.failure = answer.json()["error"]["code"]


def _picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    return data.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _expected(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, (1, 64, 64, 3), np.uint8).tobytes()


def kill_again_and_again(data: Path, num_kills: int, draw: random.Random) -> Counter[str]:
    """Kill hosts on one folder; check after each kill and at the end. Return where the kills fell."""
    fell: Counter[str] = Counter()
    rows, every = Rows(), []
    pending: list[Asked] = []
    for number in range(num_kills):
        # Of a step there are many passages; of the others one for each job, some of which are left from before.
        point = draw.choice([*POINTS, "none", "none"])
        host = Host(data, point, draw.randint(1, 20 if point == "step" else 3))
        new = [
            Asked(seed=1000 * number + i, key=f"key-{number}-{i}" if i else None, is_edit=draw.random() < 0.3)
            for i in range(3)
        ]
        every += new
        pending = [one for one in pending if one.told is None and one.failure is None][-4:] + new
        with ThreadPoolExecutor(len(pending)) as pool:
            # A client whose first connection is gone asks again only under a key.
            asking = [pool.submit(one.send, host.url) for one in pending if one.key or one in new]
            if point == "none":
                time.sleep(draw.uniform(0, 0.3))
            else:
                # Until it has ended itself, or the point is not passed so often.
                while host.is_alive and not all(each.done() for each in asking):
                    time.sleep(0.005)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    host.process.wait(0.1)
            by_itself = not host.is_alive
            host.kill()
            for each in asking:
                each.result()
        found = rows.read(data)
        fell[point if by_itself else f"any ({unfinished(found)})"] += 1
        wait_for_the_end_of_all(data)
    check_all(data, every, rows)
    return fell


def check_all(data: Path, every: list[Asked], rows: Rows) -> None:
    """Let a last host finish everything, ask for every key once more, and compare with what was promised."""
    host = Host(data)
    deadline = time.monotonic() + 120
    while any(row["state"] not in FINAL for row in rows.read(data)):
        assert time.monotonic() < deadline, "not everything ends"
        time.sleep(0.1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.send(host.url), [one for one in every if one.key]))
    host.stop()
    table = rows.read(data)
    by_key = Counter(row["idempotency_key"] for row in table if row["idempotency_key"])
    of_id = {row["job_id"]: row for row in table}
    assert set(by_key.values()) == {1}, "two jobs under one key"
    for one in every:
        if one.told is not None:
            job_id, pixels = one.told
            assert of_id[job_id]["state"] == "completed"
            assert pixels == _expected(one.seed), "another picture than the seed's"
        elif one.key is not None:
            assert one.failure == "interrupted", one
    for row in table:
        if row["state"] == "failed":
            assert row["error_code"] == "interrupted"
            assert row["idempotency_key"] is None or row["interruptions"] == 5
    wait_for_the_end_of_all(data)
    check_nothing_is_left_over(data, table)


def told(fell: Counter[str]) -> str:
    return "\n".join(f"{number:4d}  {where}" for where, number in sorted(fell.items()))


def test_a_few_kills_lose_nothing(tmp_path, capsys):
    fell = kill_again_and_again(tmp_path, 8, random.Random(5))
    with capsys.disabled():
        print(f"\nkills of the host fell here:\n{told(fell)}")
    assert sum(fell.values()) == 8


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills_lose_nothing(tmp_path, capsys):
    fell = kill_again_and_again(tmp_path, 200, random.Random(20))
    with capsys.disabled():
        print(f"\nkills of the host fell here:\n{told(fell)}")
    assert sum(fell.values()) == 200
    assert set(POINTS) <= set(fell), "some points were never hit"
