"""What the host costs beside the engine: requests, files, frames, idling. Needs no GPU and no model.

    python benchmarks/host.py                 # prints the table, writes benchmarks/results/DATE-host.json

A worker that answers at once stands in for the engine, so all of a request's time is the host's: key, validation, job
store (committed before the answer), queue, frames, file, JSON. The client is a plain loop over sockets on the same
machine. Peers in the same run: an ASGI app on the same uvicorn that does nothing but answer the same bytes, Pillow's
PNG writer, x264's presets, pickle. "CPU ms" is processor time, which says something on a busy machine, too.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

KEY = "sk-benchmark"
PATH = "/v1/images/generations"
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


def bare_host(port: int, answer: bytes) -> None:
    """The least that a server on uvicorn can do for a request: read its body and answer."""
    import uvicorn

    head = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", lifespan="off", log_level="warning", access_log=False)


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
    bodies = {
        "url": b'{"prompt": "a cube", "size": "64x64", "response_format": "url"}',
        "b64_json": b'{"prompt": "a cube", "size": "64x64"}',
    }
    with tempfile.TemporaryDirectory() as folder, _served("stub-host", folder) as ours:
        answers = {kind: Client(ours.port).post(PATH, body) for kind, body in bodies.items()}
        figures: dict[str, float] = {}
        for kind, body in bodies.items():
            file = Path(folder) / "answer.json"
            file.write_bytes(answers[kind])
            with _served("bare-host", str(file)) as bare:
                for clients in (1, 8, 32):
                    for name, server in (("ours", ours), ("bare uvicorn", bare)):
                        measured = _measured(server, body, clients, num_requests)
                        figures |= {f"{kind}, {clients} clients, {name}: {what}": n for what, n in measured.items()}
        figures["idle, % of a core"] = _idle(ours)
        return figures


@dataclass(frozen=True)
class Served:
    port: int
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """Of the server alone: the stand-in is the engine's part."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@contextmanager
def _served(role: str, *arguments: str) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, role, str(port), *arguments])
    try:
        _wait_until_ready(port, process)
        yield Served(port, process)
    finally:
        process.terminate()
        process.wait(30)


def _measured(server: Served, body: bytes, num_clients: int, num_requests: int) -> dict[str, float]:
    _together(server.port, body, num_clients, max(WARM_REQUESTS, num_requests // 4))
    before, started = server.cpu_s(), time.perf_counter()
    times = _together(server.port, body, num_clients, num_requests)
    seconds, cpu_s = time.perf_counter() - started, server.cpu_s() - before
    return {
        "p50 ms": statistics.median(times) * 1e3,
        "p95 ms": statistics.quantiles(times, n=20)[-1] * 1e3,
        "requests/s": len(times) / seconds,
        "CPU ms": cpu_s / len(times) * 1e3,
    }


def _idle(server: Served) -> float:
    before, started = server.cpu_s(), time.perf_counter()
    time.sleep(10)
    return (server.cpu_s() - before) / (time.perf_counter() - started) * 100


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            Client(port).post(PATH, b'{"prompt": "a cube", "size": "64x64"}')
            return
        except (OSError, SystemExit):
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def _together(port: int, body: bytes, num_clients: int, num_requests: int) -> list[float]:
    """Return the seconds of each request, sent by clients that wait for their answers before they go on."""
    times: list[float] = []

    def send(num: int) -> None:
        client = Client(port)
        for _ in range(num):
            started = time.perf_counter()
            client.post(PATH, body)
            times.append(time.perf_counter() - started)

    threads = [threading.Thread(target=send, args=(num_requests // num_clients,)) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


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


def costs(name: str, act: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the medians of what an act takes, by the clock and of all processors together."""
    act()
    times, cpu_times = [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        act()
        times.append(time.perf_counter() - started)
        cpu_times.append(time.process_time() - cpu_started)
    return {f"{name}, ms": statistics.median(times) * 1e3, f"{name}, CPU ms": statistics.median(cpu_times) * 1e3}


def files(repeats: int) -> dict[str, float]:
    import av

    from photogram.media import clip_file
    from photogram.media.frames import frames_of
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
        figures |= costs(f"PNG 1024x1024, {name}", write, repeats)
        figures[f"PNG 1024x1024, {name}, % of raw"] = len(write()) / still.nbytes * 100

    big = picture(580, 1000, noise=0)
    random = np.random.default_rng(1)
    clip = np.stack([big[i : i + 480, 2 * i : 2 * i + 832] for i in range(81)])
    clip = (clip + random.normal(size=clip.shape).astype(np.float32) * 0.5).clip(0, 255).astype(np.uint8)
    own = clip_file._X264
    peers = {preset: {"preset": preset, "x264-params": "mbtree=0"} for preset in ("superfast", "fast", "medium")}
    for preset, options in {"ours": own, **peers}.items():
        clip_file._X264 = options
        data = clip_file.encode_mp4(iter(clip), 832, 480, 16, 50)
        with av.open(BytesIO(data)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        error = np.mean([(np.square(a.astype(float) - b)).mean() for a, b in zip(decoded, clip, strict=True)])
        name = f"MP4 832x480x81, {preset}"
        figures |= costs(name, lambda: clip_file.encode_mp4(iter(clip), 832, 480, 16, 50), repeats)
        figures[f"{name}, MB"] = len(data) / 1e6
        figures[f"{name}, PSNR dB"] = 10 * float(np.log10(255**2 / error))
    clip_file._X264 = own

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        store = FrameStore(folder)

        def hand_over() -> None:
            with frames_of(store.put(clip), Path(folder)):
                pass

        figures |= costs("frames to the host, 97 MB, ours", hand_over, repeats)
        figures |= costs("frames to the host, 97 MB, a new file", lambda: _through_a_new_file(clip, folder), repeats)
    figures |= costs("frames to the host, 97 MB, pickled", lambda: pickle.loads(pickle.dumps(clip)), repeats)
    return figures


def _through_a_new_file(frames: np.ndarray, folder: str) -> None:
    path = Path(folder) / "new"
    path.write_bytes(frames.data)
    np.memmap(path, np.uint8, "r")
    path.unlink()


def main() -> None:
    match sys.argv[1:]:
        case ["stub-host", port, folder]:
            return host(int(port), folder)
        case ["bare-host", port, answer]:
            return bare_host(int(port), Path(answer).read_bytes())
        case ["stub-worker", path]:
            return stub_worker(path)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"{date.today()}-host.json")
    arguments = parser.parse_args()
    figures = requests(arguments.requests) | files(arguments.repeats)
    for name, figure in figures.items():
        print(f"{name:52} {figure:9.2f}")
    about = {
        "date": str(date.today()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("av", "pillow", "zlib-ng", "starlette", "uvicorn", "sqlalchemy")},
    }
    arguments.output.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
