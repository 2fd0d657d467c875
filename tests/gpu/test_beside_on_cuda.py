"""Two streams of one GPU: what is on the one is there for the other, and jobs have the bits that each has alone."""

from functools import partial

import msgspec
import numpy as np
import pytest
import torch

from photogram.worker.arguments import to_frames
from photogram.worker.beside import Lane, streams_of
from worker.drawing import Studio
from worker.test_families_served import requests_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FAMILIES = ("stable-diffusion-xl", "flux-2-klein", "qwen-image", "wan-2.1", "ltx-2")
CYCLES = 20_000_000  # of waiting: about ten milliseconds


@pytest.fixture(autouse=True)
def _every_length_is_worth_it(monkeypatch):
    monkeypatch.setattr("photogram.scheduler.scheduler.WORTHWHILE_LENGTH", 0.0)
    monkeypatch.setattr("photogram.scheduler.scheduler.WORTHWHILE_S", 0.0)


@pytest.fixture
def lane():
    return Lane(streams_of(torch.device("cuda:0")), lambda: None, "test")


@torch.inference_mode()
def test_each_stream_reads_what_the_other_has_written_however_late_that_was(lane):
    results = []

    def work(given):
        torch.cuda._sleep(CYCLES)
        return {"sum": given * 2}

    for turn in range(30):
        given = torch.empty(1 << 20, device="cuda")
        torch.cuda._sleep(CYCLES)
        given.fill_(turn)
        lane.begin(partial(work, given), lambda future: results.append(future.result()["sum"] + 1))
        del given  # its memory may be had again at once, and is written below
        torch.empty(1 << 20, device="cuda").fill_(-1)
        lane.take()
    lane.take(wait=True)
    for turn, result in enumerate(results):
        assert (result == 2 * turn + 1).all()


@torch.inference_mode()
def test_memory_of_a_result_that_the_loop_still_reads_is_not_used_again(lane):
    sums = []

    def work(value):
        return torch.full((1 << 20,), float(value), device="cuda")

    results: list[torch.Tensor] = []
    for turn in range(30):
        lane.begin(partial(work, turn), lambda future: results.append(future.result()))
        lane.take(wait=True)
        torch.cuda._sleep(CYCLES)
        sums.append(results.pop().sum())  # read late, and let go of now
        lane.begin(partial(work, -1), lambda future: None)
        lane.take(wait=True)
    assert [float(total) for total in sums] == [float(turn * (1 << 20)) for turn in range(30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_frames_are_those_that_a_cpu_makes_of_them(dtype):
    frames = torch.rand(2, 9, 3, 48, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    np.testing.assert_array_equal(to_frames((frames.cuda(),)), to_frames((frames,)))


def note_busy(lane: Lane, busy: list[int], turn: int) -> None:
    if lane.is_busy:
        busy.append(turn)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_jobs_drawn_beside_each_other_have_the_bits_of_jobs_in_their_turn(name, cuda_graphs, family_folder, tmp_path):
    requests = [
        msgspec.structs.replace(one, job_id=f"{one.job_id}-{i}", seed=i, num_inference_steps=2 + (5 * i) % 9)
        for i in range(4)
        for one in requests_of(name)
    ]
    drawn = {}
    for beside in (False, True):
        settings = {"max_batch_size": 1, "prompt_cache_mb": 0, "side_stream": beside, "cuda_graphs": cuda_graphs}
        studio = Studio(family_folder(name), tmp_path, **settings)
        studio.draw(requests[:3])  # prices become known, and graphs are recorded
        busy: list[int] = []
        drawn[beside] = studio.draw(requests, meanwhile=partial(note_busy, studio.worker._lane, busy))
        assert bool(busy) == beside
    for request in requests:
        assert drawn[True][request.job_id].failure is None
        assert (drawn[True][request.job_id].latents == drawn[False][request.job_id].latents).all()
        assert (drawn[True][request.job_id].frames == drawn[False][request.job_id].frames).all()


def test_jobs_cancelled_while_they_are_decoded_beside_others_give_their_memory_back(family_folder, tmp_path):
    studio = Studio(family_folder("wan-2.1"), tmp_path, side_stream=True)
    studio.draw(requests_of("wan-2.1"))
    studio.draw(requests_of("wan-2.1"))

    def held() -> int:
        studio.worker.latents.clear()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def cancel(turn: int) -> None:
        if studio.worker._lane.is_busy:
            for job_id in list(studio.worker.jobs):
                studio.worker.cancel(job_id)

    before = held()
    for _ in range(10):
        studio.draw(requests_of("wan-2.1"), meanwhile=cancel)
    assert held() <= before + (8 << 20)
