"""A photogram server in a process of its own, started as a user would: `photogram serve ...`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import psutil

READY_WITHIN_S = 300  # two slow cores may load other workers at the same time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """One server. `url` is without /v1; `log` is all it has said so far."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.flags = flags
        self.env = env or {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, ready: bool = True) -> Running:
        command = [
            sys.executable,
            "-m",
            "photogram",
            "serve",
            *self.flags,
        ]
        command += ["--port", str(self.port), "--data-dir", str(self.folder / "data")]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self.env
            )
        if ready:
            self.wait_ready()
        return self

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-3000:]}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the server was not ready within {READY_WITHIN_S} s:\n{self.log[-3000:]}")

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "sk-anything", "timeout": 300} | options))

    def worker_pid(self) -> int:
        """Process id of the worker, which is the host's only child that runs photogram.worker."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process(self.process.pid).children():
                if "photogram.worker" in child.cmdline():
                    return child.pid
            time.sleep(0.05)
        raise AssertionError("there is no worker")

    def batches(self) -> list[int]:
        """The largest batch that each finished job was part of, in the order of the log."""
        return [int(size) for size in re.findall(r"largest batch (\d+)", self.log)]

    def status(self) -> dict[str, object]:
        return json.loads(httpx.get(f"{self.url}/ready", timeout=10).text)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, within_s: float = 30) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {within_s} s:\n{self.log[-2000:]}") from None


def serve(folder: Path, flags: Sequence[str] = (), **options: object) -> Running:
    """Start a server and wait until it is ready."""
    return Running(folder, *flags, **options).start()
