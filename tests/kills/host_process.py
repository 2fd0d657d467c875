"""The host's process, started and killed from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from running import READY_WITHIN_S, free_port

TESTS = Path(__file__).parents[1]
# Inherited by all that a host starts, to know them by when it is gone.
MARK = "PHOTOGRAM_KILLS"


class Host:
    """One server, ready or dead already when the constructor returns."""

    def __init__(self, data: Path, point: str = "none", passage: int = 1, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kills.host", str(self.port), str(data), point, str(passage), *flags],
            env={**os.environ, "PYTHONPATH": paths, MARK: str(data)},
        )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for a model that takes requests, or for the end: it may die over what the last one left."""
        deadline = time.monotonic() + READY_WITHIN_S
        while self.is_alive and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.02)
        assert not self.is_alive, f"the server is not ready after {READY_WITHIN_S} s"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def worker(self) -> psutil.Process | None:
        """Return the present worker, if there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "photogram.worker" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return child
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0


def wait_for_the_end_of_all(data: Path, within_s: float = 10.0) -> None:
    """Return once no process is left that a host of this folder has started."""
    deadline = time.monotonic() + within_s
    while left := processes_of(data):
        assert time.monotonic() < deadline, f"they outlive their host: {left}"
        time.sleep(0.02)


def processes_of(data: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # Neither a process that ends meanwhile nor another user's is ours; a dead one that waits to be reaped has
        # no environment any more.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            if process.environ().get(MARK) == str(data):
                found.append(process)
    return found
