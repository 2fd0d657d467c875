"""Several workers behind one queue: real processes and the real protocol, with a stand-in for the model."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError, EngineLost, RequestError
from photogram.core.messages import DeviceMemory, Failed, Finished, JobEvent, Progress
from photogram.core.request import GenerateRequest, LoraUse
from photogram.engine.replicas import Replicas

TESTS = Path(__file__).parent.parent


class Crew:
    """Two replicas, and what is heard of each job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = (sys.executable, "-m", "engine.stand_in_replica", str(folder))
        config = ServeConfig(num_gpus=2, dp_size=2, device="cpu")
        self.engine = Replicas(config, folder, worker_command=command)
        self._events: dict[str, asyncio.Queue[JobEvent]] = {}

    def submit(self, job_id: str, prompt: str = "", *, steps: int = 4) -> None:
        request = GenerateRequest(
            job_id=job_id, owner="o", task="T2I", prompt=prompt, width=8, height=8, num_inference_steps=steps, seed=0
        )
        self._events[job_id] = asyncio.Queue()
        self.engine.submit(request, self._events[job_id].put_nowait)

    async def next_of(self, job_id: str) -> JobEvent:
        async with asyncio.timeout(60):
            return await self._events[job_id].get()

    async def replica_of(self, job_id: str) -> int:
        """Which replica begins the job next."""
        event = await self.next_of(job_id)
        assert isinstance(event, Progress), event
        return event.step

    async def maker_of(self, job_id: str) -> int:
        """Which replica finishes the job."""
        event = await self.next_of(job_id)
        assert isinstance(event, Finished), event
        return Path(event.frames.path).read_bytes()[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    def all_ready(self) -> bool:
        return self.engine.status.state == "ready" and self.engine.status.detail.startswith("The model")

    def heard_of_loras(self, replica: int) -> list[str]:
        return (self.folder / f"loras-{replica}").read_text().splitlines()


@pytest.fixture
def crew(tmp_path, monkeypatch) -> Callable[[Callable[[Crew], Awaitable[None]]], None]:
    """Return what runs a story with two replicas that are ready, or as they are."""
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def run(story: Callable[[Crew], Awaitable[None]], *, ready: bool = True) -> None:
        async def whole() -> None:
            crew = Crew(tmp_path)
            await crew.engine.start()
            try:
                if ready:
                    await crew.engine.wait_ready()
                    await crew.until(crew.all_ready)
                await story(crew)
            finally:
                await crew.engine.stop(0.0)

        asyncio.run(whole())

    return run


def test_a_job_goes_to_the_replica_with_the_least_work(crew):
    async def story(crew: Crew) -> None:
        crew.submit("long", "hold", steps=10)
        crew.submit("short", "hold", steps=4)
        crew.submit("also short", "hold", steps=4)
        crew.submit("short again", "hold", steps=4)
        crew.submit("last", "hold", steps=4)
        names = ("long", "short", "also short", "short again", "last")
        assert [await crew.replica_of(name) for name in names] == [0, 1, 1, 1, 0]

    crew(story)


def test_a_cancelled_job_ends_where_it_runs_and_makes_room_there(crew):
    async def story(crew: Crew) -> None:
        crew.submit("a", "hold")
        crew.submit("b", "hold")
        assert (await crew.replica_of("a"), await crew.replica_of("b")) == (0, 1)
        crew.engine.cancel("b")
        ended = await crew.next_of("b")
        assert isinstance(ended, Failed)
        assert ended.code == "cancelled"
        crew.submit("c", "hold")
        assert await crew.replica_of("c") == 1
        crew.engine.cancel("unknown")

    crew(story)


def test_the_jobs_of_a_replica_that_is_killed_go_to_the_other_while_it_is_replaced(crew):
    async def story(crew: Crew) -> None:
        crew.submit("on the first", "hold on 0")
        assert await crew.replica_of("on the first") == 0
        victim = crew.engine.worker_pids[0]
        os.kill(victim, signal.SIGKILL)
        assert await crew.replica_of("on the first") == 1
        assert await crew.maker_of("on the first") == 1
        await crew.until(crew.all_ready)
        assert crew.engine.status.num_restarts == 1
        assert victim not in crew.engine.worker_pids
        crew.submit("next", "hold")
        assert await crew.replica_of("next") == 0

    crew(story)


def test_a_replica_whose_model_cannot_be_served_leaves_the_others_serving(crew, tmp_path):
    (tmp_path / "unservable-0").touch()

    async def story(crew: Crew) -> None:
        assert (await crew.engine.wait_ready()).name == "stand-in"
        await crew.until(lambda: "it is broken" in crew.engine.status.detail)
        assert crew.engine.status.state == "ready"
        assert crew.engine.status.detail.startswith("1 of 2 workers are ready.")
        crew.submit("a")
        assert await crew.replica_of("a") == 1

    crew(story, ready=False)


def test_the_jobs_of_a_replica_that_can_no_longer_start_go_to_one_that_came_back(crew, tmp_path):
    async def story(crew: Crew) -> None:
        crew.submit("a", "hold on 0")
        assert await crew.replica_of("a") == 0
        (tmp_path / "dying-0").touch()
        for pid in crew.engine.worker_pids:
            os.kill(pid, signal.SIGKILL)
        assert await crew.replica_of("a") == 1
        assert await crew.maker_of("a") == 1

    crew(story)


def test_where_no_replica_can_start_any_more_every_job_ends_and_new_ones_are_refused(crew, tmp_path):
    async def story(crew: Crew) -> None:
        crew.submit("a", "hold on 0")
        assert await crew.replica_of("a") == 0
        crew.submit("b", "hold on 1")
        assert await crew.replica_of("b") == 1
        for replica in (0, 1):
            (tmp_path / f"dying-{replica}").touch()
        for pid in crew.engine.worker_pids:
            os.kill(pid, signal.SIGKILL)
        await crew.until(lambda: crew.engine.status.state == "failed")
        for name in ("a", "b"):
            event = await crew.next_of(name)
            while isinstance(event, Progress):  # it may have begun on the other one for a moment
                event = await crew.next_of(name)
            assert isinstance(event, Failed)
            assert event.code == EngineLost.code
        with pytest.raises(EngineLost):
            crew.submit("c")

    crew(story)


def test_a_model_that_no_replica_can_serve_is_refused(crew, tmp_path):
    (tmp_path / "unservable-0").touch()
    (tmp_path / "unservable-1").touch()

    async def story(crew: Crew) -> None:
        with pytest.raises(ConfigError, match="it is broken"):
            await crew.engine.wait_ready()
        assert crew.engine.status.state == "failed"

    crew(story, ready=False)


def test_loras_are_set_on_all_replicas_or_on_none(crew):
    def named(nickname: str) -> tuple[LoraUse, ...]:
        return (LoraUse(nickname=nickname, path=f"/{nickname}.safetensors"),)

    async def story(crew: Crew) -> None:
        await crew.engine.set_loras(named("good"))
        with pytest.raises(RequestError) as refused:
            await crew.engine.set_loras(named("refused by 1"))
        assert (refused.value.code, refused.value.param) == ("invalid_lora", "lora_path")
        assert crew.heard_of_loras(0) == ["SetLoras good", "SetLoras refused by 1", "SetLoras good"]
        assert crew.heard_of_loras(1) == ["SetLoras good", "SetLoras refused by 1"]
        os.kill(crew.engine.worker_pids[1], signal.SIGKILL)
        await crew.until(lambda: crew.engine.status.num_restarts == 1 and crew.all_ready())
        await crew.engine.prepare_loras()
        assert crew.heard_of_loras(1)[2:] == ["SetLoras good", "PrepareLoras "]

    crew(story)


def test_what_each_replica_does_is_counted_and_outlives_it(crew):
    async def story(crew: Crew) -> None:
        first, second = crew.engine.figures
        assert first.memory is None
        for name in ("a", "b", "c"):
            crew.submit(name, "hold")
            await crew.replica_of(name)
        assert (first.passes["transformer", 1], second.passes["transformer", 1]) == (2, 1)
        await crew.engine.set_loras((LoraUse(nickname="pastel", path="/pastel"),))
        await crew.until(lambda: (first.num_lora_switches, second.num_lora_switches) == (1, 1))
        assert first.memory == DeviceMemory(allocated_bytes=1, reserved_bytes=2, total_bytes=3)
        os.kill(crew.engine.worker_pids[0], signal.SIGKILL)
        # The one that takes its place is given the set again.
        await crew.until(lambda: first.num_lora_switches == 2)
        assert crew.engine.figures == (first, second)
        assert (first.passes["transformer", 1], second.num_lora_switches) == (2, 1)

    crew(story)
