"""The promises of the worker, kept on a GPU: real pipeline classes, tiny random weights, fp32 and bf16."""

import gc
import shutil
import time

import pytest
import torch
from diffusers import DiffusionPipeline

from families.ltx2 import add_upsampler
from photogram.core.config import ServeConfig
from photogram.core.messages import Vitals
from photogram.worker.loading import load
from photogram.worker.worker import Worker, run_until_idle
from worker.drawing import Studio, draw_alone, relative_error
from worker.test_families_served import STACKED_TOLERANCE, requests_of
from worker.test_two_stages import by_hand, two_stage_requests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FAMILIES = (
    "stable-diffusion-xl",
    "stable-diffusion-3",
    "flux-1",
    "flux-2-klein",
    "qwen-image",
    "z-image",
    "sana",
    "wan-2.1",
    "wan-2.2",
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_interleaved_jobs_give_the_bits_of_the_pipeline_alone(name, precision, family_folder, tmp_path):
    requests = requests_of(name)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    plain = DiffusionPipeline.from_pretrained(family_folder(name), dtype=dtype).to("cuda")
    alone = {request.job_id: draw_alone(plain, request) for request in requests}
    # What makes it faster takes other kernels, and so other bits.
    as_plain = {"attention_backend": "torch", "channels_last": False}
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1, precision=precision, **as_plain)
    assert studio.served.device.type == "cuda"
    # Some VAEs are served in fp32 beside a bf16 denoiser, which the stock pipeline cannot do.
    same_decoder = studio.card.precisions["vae"] == precision
    interleaved = studio.draw(requests)
    for job_id, reference in alone.items():
        assert interleaved[job_id].failure is None
        assert (interleaved[job_id].latents == reference.latents).all()
        if same_decoder:
            assert (interleaved[job_id].frames == reference.frames).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_jobs_stay_within_tolerance(name, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name), dtype=torch.float32).to("cuda")
    studio = Studio(family_folder(name), tmp_path, precision="fp32")
    stacked = studio.draw(requests)
    assert max(len(jobs) for jobs in studio.passes("transformer", "transformer_2", "unet")) == 3
    for request in requests:
        reference = draw_alone(plain, request)
        assert relative_error(stacked[request.job_id].latents, reference.latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_stages_give_the_bits_of_the_three_pipelines_called_by_hand(precision, family_folder, tmp_path):
    shutil.copytree(family_folder("ltx-2"), tmp_path / "ltx-2")
    add_upsampler(tmp_path / "ltx-2")
    as_plain = {"attention_backend": "torch", "channels_last": False}
    studio = Studio(tmp_path / "ltx-2", tmp_path, max_batch_size=1, precision=precision, **as_plain)
    requests = two_stage_requests()
    drawn = studio.draw(requests)
    for request in requests:
        assert drawn[request.job_id].failure is None
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        alone = by_hand(tmp_path / "ltx-2", request, device="cuda", dtype=dtype)
        assert torch.equal(drawn[request.job_id].latents, alone.latents)


def test_cancelled_jobs_give_their_memory_back(family_folder, tmp_path):
    studio = Studio(family_folder("wan-2.1"), tmp_path)
    studio.draw(requests_of("wan-2.1"))
    studio.worker.latents.clear()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(30):

        def cancel_all(turn: int) -> None:
            if turn == 8:
                for job_id in list(studio.worker.jobs):
                    studio.worker.cancel(job_id)

        studio.draw(requests_of("wan-2.1"), meanwhile=cancel_all)
    studio.worker.latents.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_real_out_of_memory_fails_one_job_and_the_next_succeeds(family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    hog = torch.empty(torch.cuda.mem_get_info()[0] - (600 << 20), dtype=torch.uint8, device="cuda")
    large, small = requests_of("flux-2-klein")[:2]
    values = {name: getattr(large, name) for name in large.__struct_fields__}
    large = type(large)(**(values | {"width": 4096, "height": 4096, "num_inference_steps": 1}))
    drawn = studio.draw([large])
    assert drawn[large.job_id].failure.code == "out_of_memory"
    assert studio.draw([small])[small.job_id].failure is None
    del hog


def test_device_time_is_reported_though_passes_are_launched_ahead(family_folder, tmp_path):
    """The cost model must learn the device's seconds, not those of the launch."""
    config = ServeConfig(model_path=str(family_folder("stable-diffusion-xl"))).worker(tmp_path)
    messages = []
    with torch.inference_mode():
        worker = Worker(load(config, lambda stage: None, lambda reason: None), config, messages.append, time.monotonic)
        for request in requests_of("stable-diffusion-xl"):
            worker.submit(request)
        run_until_idle(worker)
    estimates = [message.eta_s for message in messages if type(message).__name__ == "Progress"]
    assert estimates[-1] is not None


def test_the_host_is_told_of_the_memory_of_the_device(family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    studio.draw(requests_of("flux-2-klein"))
    [*_, last] = [message.memory for message in studio.messages if isinstance(message, Vitals)]
    weights = sum(parameter.nbytes for parameter in studio.served.modules["transformer"].module.parameters())
    assert weights < last.allocated_bytes <= last.reserved_bytes < last.total_bytes
    assert last.total_bytes == torch.cuda.mem_get_info()[1]
