"""What the host costs beside the engine: requests, files, frames, idling. Needs no GPU and no model.

    python benchmarks/host.py                 # prints the table, writes benchmarks/results/DATE-host.json

A worker that answers at once stands in for the engine, so all of a request's time is the host's: key, validation, job
store (committed before the answer), queue, frames, file, JSON. The client is a plain loop over sockets on the same
machine. Peers in the same run: Pillow's PNG writer, x264's `fast` and `medium` presets, pickle over a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

KEY = "sk-benchmark"
WARM_REQUESTS = 50


# --- a worker that answers at once


def stub_worker(path: str) -> None:
    from photogram.core.card import ModelCard
    from photogram.core.messages import Finished, FrameBlock, Load, Ready, Shutdown, Submit
    from photogram.core.wire import HEADER_BYTES, body_length, pack, to_worker

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    with connection.makefile("rb") as stream:
        folder = Path()
        while header := stream.read(HEADER_BYTES):
            match to_worker.decode(stream.read(body_length(header))):
                case Load(config=config):
                    folder = Path(config.frames_dir)
                    card = ModelCard(
                        name="stub",
                        model_path="stub",
                        pipeline_class="StubPipeline",
                        tasks=("T2I",),
                        media="image",
                        default_width=64,
                        default_height=64,
                        size_multiple=16,
                        default_steps=1,
                        device="cpu",
                        device_name="a processor",
                    )
                    connection.sendall(pack(Ready(card)))
                case Submit(request=request):
                    shape = (1, request.height, request.width, 3)
                    block = folder / f"{secrets.token_hex(16)}.frames"
                    block.write_bytes(bytes(int(np.prod(shape))))
                    done = Finished(request.job_id, FrameBlock(str(block), shape), 1, 1, 0.0)
                    connection.sendall(pack(done))
                case Shutdown():
                    return


def host(port: int, data_dir: str) -> None:
    import uvloop

    from photogram.core.config import ServeConfig
    from photogram.engine.worker_engine import WorkerEngine
    from photogram.server.run import serve

    config = ServeConfig(port=port, data_dir=data_dir, api_key=(KEY,), log_level="warning")
    command = (sys.executable, __file__, "stub-worker")
    uvloop.run(serve(config, lambda config, folder: WorkerEngine(config, folder, worker_command=command)))


# --- requests


class Client:
    """One connection that is kept."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")

    def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)
        status, length = self._stream.readline(), 0
        while (line := self._stream.readline().strip().lower()) != b"":
            name, _, value = line.partition(b":")
            if name == b"content-length":
                length = int(value)
        answer = self._stream.read(length)
        if b" 200 " not in status:
            raise SystemExit(f"{status!r} {answer!r}")
        return answer


def requests(num_requests: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen([sys.executable, __file__, "stub-host", str(port), folder])
        try:
            _wait_until_ready(port, process)
            bodies = {
                "url": b'{"prompt": "a cube", "size": "64x64", "response_format": "url"}',
                "b64_json": b'{"prompt": "a cube", "size": "64x64"}',
            }
            figures: dict[str, float] = {}
            for kind, body in bodies.items():
                _alone(port, body, WARM_REQUESTS)
                times = _alone(port, body, num_requests)
                figures[f"{kind}: one client, p50 ms"] = statistics.median(times) * 1e3
                figures[f"{kind}: one client, p95 ms"] = statistics.quantiles(times, n=20)[-1] * 1e3
                for clients in (8, 32):
                    _together(port, body, clients, num_requests // 4)
                    before = _cpu_seconds(process.pid)
                    started = time.perf_counter()
                    _together(port, body, clients, num_requests)
                    seconds = time.perf_counter() - started
                    figures[f"{kind}: {clients} clients, requests/s"] = num_requests / seconds
                    figures[f"{kind}: {clients} clients, host CPU ms"] = (
                        (_cpu_seconds(process.pid) - before) / num_requests * 1e3
                    )
            before, started = _cpu_seconds(process.pid), time.perf_counter()
            time.sleep(10)
            figures["idle, % of a core"] = (_cpu_seconds(process.pid) - before) / (time.perf_counter() - started) * 100
            return figures
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            Client(port).post("/v1/images/generations", b'{"prompt": "a cube", "size": "64x64"}')
            return
        except (OSError, SystemExit):
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def _alone(port: int, body: bytes, num_requests: int) -> list[float]:
    client, times = Client(port), []
    for _ in range(num_requests):
        started = time.perf_counter()
        client.post("/v1/images/generations", body)
        times.append(time.perf_counter() - started)
    return times


def _together(port: int, body: bytes, num_clients: int, num_requests: int) -> None:
    share = num_requests // num_clients
    threads = [threading.Thread(target=_alone, args=(port, body, share)) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _cpu_seconds(pid: int) -> float:
    """Of the host alone: the stand-in is the engine's part."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# --- files and frames


def picture(height: int, width: int, noise: float, seed: int = 0) -> np.ndarray:
    """Smooth colour at all scales with a little noise, as diffusion models draw: uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        side = 2**octave
        for channel in range(3):
            grid = (random.normal(size=(side + 1, side + 1)) / side).astype(np.float32)
            total[..., channel] += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    total = (total - total.min()) / (total.max() - total.min()) * 255
    return (total + random.normal(size=total.shape) * noise).clip(0, 255).astype(np.uint8)


def milliseconds(act: Callable[[], object], repeats: int) -> float:
    act()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def files(repeats: int) -> dict[str, float]:
    import av

    from photogram.media import clip_file
    from photogram.media.frames import take_frames
    from photogram.media.png import png
    from photogram.worker.frame_store import FrameStore

    still = picture(1024, 1024, noise=1.5)

    def pillow(level: int) -> bytes:
        file = BytesIO()
        Image.fromarray(still).save(file, "PNG", compress_level=level)
        return file.getvalue()

    figures: dict[str, float] = {}
    writers = {"ours": lambda: png(still), "Pillow": lambda: pillow(6), "Pillow, 1": lambda: pillow(1)}
    for name, write in writers.items():
        figures[f"PNG 1024x1024, {name}, ms"] = milliseconds(write, repeats)
        figures[f"PNG 1024x1024, {name}, % of raw"] = len(write()) / still.nbytes * 100

    big = picture(580, 1000, noise=0)
    random = np.random.default_rng(1)
    clip = np.stack([big[i : i + 480, 2 * i : 2 * i + 832] for i in range(81)])
    clip = (clip + random.normal(size=clip.shape).astype(np.float32) * 0.5).clip(0, 255).astype(np.uint8)
    own_preset = clip_file._X264["preset"]
    for preset in (own_preset, "fast", "medium"):
        clip_file._X264["preset"] = preset
        data = clip_file.encode_mp4(iter(clip), 832, 480, 16, 50)
        with av.open(BytesIO(data)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        error = np.mean([(np.square(a.astype(float) - b)).mean() for a, b in zip(decoded, clip, strict=True)])
        name = f"MP4 832x480x81, {preset}{' (ours)' if preset == own_preset else ''}"
        figures[f"{name}, ms"] = milliseconds(lambda: clip_file.encode_mp4(iter(clip), 832, 480, 16, 50), repeats)
        figures[f"{name}, MB"] = len(data) / 1e6
        figures[f"{name}, PSNR dB"] = 10 * float(np.log10(255**2 / error))
    clip_file._X264["preset"] = own_preset

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        store = FrameStore(folder)
        figures["frames to the host, 97 MB, ours, ms"] = milliseconds(
            lambda: take_frames(store.put(clip), Path(folder)), repeats
        )
    figures["frames to the host, 97 MB, pickled, ms"] = milliseconds(lambda: pickle.loads(pickle.dumps(clip)), repeats)
    return figures


def main() -> None:
    match sys.argv[1:]:
        case ["stub-host", port, folder]:
            return host(int(port), folder)
        case ["stub-worker", path]:
            return stub_worker(path)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"{date.today()}-host.json")
    arguments = parser.parse_args()
    figures = requests(arguments.requests) | files(arguments.repeats)
    for name, figure in figures.items():
        print(f"{name:45} {figure:9.2f}")
    about = {
        "date": str(date.today()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("av", "pillow", "zlib-ng", "starlette", "uvicorn", "sqlalchemy")},
    }
    arguments.output.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
