"""A service without HTTP: the fake engine, a real store and real files; and clips to give it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from photogram.core.config import ServeConfig
from photogram.core.request import GenerateRequest, OutputSpec
from photogram.jobs.inputs import INPUTS, InputFolders
from photogram.jobs.record import new_id
from photogram.jobs.recovery import recover
from photogram.jobs.store import open_store
from photogram.media.pool import MediaPool
from photogram.server.live import Moved
from photogram.server.resolve import Drawing
from photogram.server.service import Service
from photogram.storage.local import LocalStorage

from .fake_engine import FakeEngine, image_card


class Running:
    """The parts of one server."""

    def __init__(self, folder: Path, **settings) -> None:
        self.config = ServeConfig(data_dir=str(folder), **settings)
        self.store = open_store(folder)
        self.storage = LocalStorage(folder / "files")
        self.inputs = InputFolders(folder / INPUTS)
        frames_dir = folder / "frames"
        frames_dir.mkdir(exist_ok=True)
        self.media = MediaPool(frames_dir)
        name = self.config.served_model_name or "acme/wan"
        card = image_card(name=name, media="video", tasks=("T2V", "I2V"), default_fps=16)
        self.engine = FakeEngine(frames_dir, card=card, state="loading" if name == "loading" else "ready")
        self.service = Service(self.config, self.engine, self.store, self.storage, self.media, self.inputs)

    def new_inputs(self) -> str:
        name = new_id("in").partition("_")[2]
        (self.inputs.root / name).mkdir(parents=True)
        (self.inputs.root / name / "0.png").write_bytes(b"picture")
        return name

    async def begin(self, prompt: str, *, inputs: str | None = None, **options) -> str:
        drawing = clip(prompt)
        record = await self.service.begin_clip(drawing, model="wan", inputs=inputs, **options)
        return record.job_id

    async def ended(self, job_id: str) -> str:
        """The final state of a job."""
        async for outcome in self.service.watch(job_id):
            last = outcome
        assert isinstance(last, Moved)
        return last.record.state

    async def until_state(self, job_id: str, state: str) -> None:
        while (await self.store.get(job_id)).state != state:
            await asyncio.sleep(0.005)

    def files(self) -> list[Path]:
        return [path for path in (Path(self.config.data_dir) / "files").rglob("*") if path.is_file()]


def clip(prompt: str, *, steps: int = 3, owner: str = "ann") -> Drawing:
    request = GenerateRequest(
        job_id=new_id("video"),
        owner=owner,
        task="T2V",
        prompt=prompt,
        width=64,
        height=48,
        num_frames=5,
        fps=16,
        num_inference_steps=steps,
        seed=7,
    )
    return Drawing(request=request, output=OutputSpec(width=64, height=48, format="mp4", compression=50, fps=16))


@asynccontextmanager
async def server(folder: Path, **settings) -> AsyncIterator[Running]:
    """Start as `photogram serve` does, and end in good order."""
    running = Running(folder, **settings)
    await recover(running.store, running.storage, running.inputs)
    await running.engine.start()
    await running.service.resume()
    try:
        yield running
    finally:
        running.service.drain()
        await running.engine.stop(0)
        await running.service.end()
        running.media.close()
        await running.store.close()
