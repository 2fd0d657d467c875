"""The engine and LoRAs, with a real worker process: a set outlives its worker, a mistake is the caller's error."""

import asyncio
import os
import signal

import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import RequestError
from photogram.core.request import LoraUse
from photogram.engine.worker_engine import WorkerEngine
from worker.lora.files import diffusers_file


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.05)


def test_the_active_set_is_given_to_the_worker_that_takes_the_place(family_folder, tmp_path):
    path = str(diffusers_file(tmp_path / "a.safetensors", "transformer", {"x_embedder": (32, 64)}, rank=2))
    use = LoraUse(nickname="a", path=path, strength=0.5)
    config = ServeConfig(model_path=str(family_folder("flux-1")), warmup=False)

    async def story() -> None:
        engine = WorkerEngine(config, tmp_path)
        await engine.start()
        card = await engine.wait_ready()
        assert card.lora_modules == ("transformer", "text_encoder")
        before = await engine.set_loras((use,))
        assert before.active["transformer"][0].num_lora_layers_with_weights == 1
        with pytest.raises(RequestError) as caught:
            await engine.set_loras((LoraUse(nickname="b", path=str(tmp_path / "absent.safetensors")),))
        assert (caught.value.code, caught.value.param) == ("lora_not_found", "lora_path")
        assert (await engine.prepare_loras()).active == before.active
        os.kill(engine.worker_pid, signal.SIGKILL)
        await until(lambda: engine.status.num_restarts == 1 and engine.status.state == "ready")
        assert (await engine.prepare_loras()).active == before.active
        await engine.stop(1.0)

    asyncio.run(story())
