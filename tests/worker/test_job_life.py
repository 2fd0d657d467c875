"""What happens to a job between its calls: progress, previews, cancelling, failing."""

import gc

import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.core.errors import GenerationFailed
from photogram.core.messages import Failed, Finished, Progress
from photogram.core.request import GenerateRequest

from .drawing import Studio, draw_alone
from .test_families_served import requests_of

PICTURE_FAMILIES = (
    "stable-diffusion-xl",
    "stable-diffusion-3",
    "flux-1",
    "flux-2-klein",
    "qwen-image",
    "z-image",
    "sana",
)


@pytest.fixture(scope="module")
def studio(family_folder, tmp_path_factory):
    return Studio(family_folder("flux-2-klein"), tmp_path_factory.mktemp("frames"))


def request(**changes) -> GenerateRequest:
    values = {
        "job_id": "job",
        "owner": "test",
        "task": "T2I",
        "prompt": "a red circle",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "seed": 7,
    }
    return GenerateRequest(**(values | changes))


def test_progress_never_falls_and_counts_every_step(studio):
    studio.draw([request(num_inference_steps=9)])
    reports = [message for message in studio.messages if isinstance(message, Progress)]
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] < 1
    assert {report.step for report in reports if report.phase == "denoise"} >= set(range(9))
    assert {report.num_steps for report in reports} == {9}


def test_progress_of_two_denoisers_is_one_count_of_all_steps(family_folder, tmp_path):
    """Wan 2.2 A14B: the first transformer's steps and the second one's are the same clip's."""
    studio = Studio(family_folder("wan-2.2"), tmp_path)
    job = requests_of("wan-2.2")[1]
    studio.draw([job])
    assert studio.passes("transformer")
    assert studio.passes("transformer_2")
    reports = [message for message in studio.messages if isinstance(message, Progress)]
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1
    steps = [report.step for report in reports if report.phase == "denoise"]
    assert steps == sorted(steps)
    assert set(steps) == set(range(job.num_inference_steps))
    assert {report.num_steps for report in reports} == {job.num_inference_steps}


@pytest.mark.parametrize("name", ["wan-2.1", "hunyuan-video-1.5", "ltx"])
def test_each_step_is_told_once_however_many_calls_it_takes(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    job = msgspec.structs.replace(requests_of(name)[0], num_inference_steps=3)
    studio.draw([job])
    calls_per_step = {"wan-2.1": 2, "hunyuan-video-1.5": 2, "ltx": 1}[name]
    assert len(studio.passes("transformer")) == 3 * calls_per_step
    reports = [message for message in studio.messages if isinstance(message, Progress)]
    assert [(report.phase, report.step) for report in reports] == [
        ("encode", 0), ("denoise", 0), ("denoise", 1), ("denoise", 2), ("decode", 3)
    ]  # fmt: skip


def test_finish_time_is_estimated_once_a_like_job_has_run(studio):
    studio.draw([request(job_id="first", num_inference_steps=6)])
    studio.draw([request(job_id="second", num_inference_steps=6)])
    estimates = [message.eta_s for message in studio.messages if isinstance(message, Progress)]
    assert all(estimate is not None and estimate >= 0 for estimate in estimates)
    assert estimates[-1] < estimates[0]


@pytest.mark.parametrize("name", PICTURE_FAMILIES)
def test_partial_pictures_approach_the_final_one_which_is_the_same_with_and_without(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    plain = requests_of(name)[1]
    changes = {name: getattr(plain, name) for name in plain.__struct_fields__} | {"num_inference_steps": 8}
    without = studio.draw([GenerateRequest(**changes)])[plain.job_id]
    watched = studio.draw([GenerateRequest(**(changes | {"partial_images": 3}))])[plain.job_id]
    assert (watched.frames == without.frames).all()
    assert len(watched.previews) == 3
    distances = [float(np.abs(p.astype(int) - without.frames.astype(int)).mean()) for p in watched.previews]
    # With random weights the way there need not be straight; that of a trained model is tested where it is served.
    assert 0 < distances[-1] < distances[0], f"partial pictures do not approach the final one: {distances}"


@pytest.mark.parametrize("name", ["wan-2.1", "ltx", "ltx-2"])
def test_a_clip_is_shown_by_its_first_frame_and_stays_the_same(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    plain = requests_of(name)[1]
    without = studio.draw([plain])[plain.job_id]
    fields = {field: getattr(plain, field) for field in plain.__struct_fields__} | {"partial_images": 2}
    watched = studio.draw([GenerateRequest(**fields)])[plain.job_id]
    assert (watched.frames == without.frames).all()
    assert len(watched.frames) == plain.num_frames
    assert [preview.shape for preview in watched.previews] == [watched.frames[:1].shape] * 2


def test_a_partial_picture_that_cannot_be_made_does_not_cost_the_job(studio):
    decoder = studio.served.modules["vae"]
    real, calls = decoder.real["decode"], []

    def broken_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no memory for a partial picture")
        return real(*args, **kwargs)

    expected = studio.draw([request()])["job"].frames
    decoder.real["decode"] = broken_once
    try:
        drawn = studio.draw([request(partial_images=2)])["job"]
    finally:
        decoder.real["decode"] = real
    assert drawn.failure is None
    assert drawn.previews == []
    assert (drawn.frames == expected).all()


def test_what_fails_once_networks_have_run_is_not_said_of_the_request(studio):
    denoiser = studio.served.modules["transformer"]
    real = denoiser.real["forward"]

    def broken(*args, **kwargs):
        raise ValueError("expected more than one value")

    denoiser.real["forward"] = broken
    try:
        failure = studio.draw([request()])["job"].failure
    finally:
        denoiser.real["forward"] = real
    assert failure.code == GenerationFailed.code
    assert "ValueError: expected more than one value" in failure.message


def test_cancel_takes_effect_at_the_next_call(studio):
    def cancel_early(turn: int) -> None:
        if turn == 4:
            studio.worker.cancel("job")

    studio.draw([request(num_inference_steps=50)], meanwhile=cancel_early)
    assert isinstance(studio.messages[-1], Failed)
    assert studio.messages[-1].code == "cancelled"
    assert len(studio.passes("transformer")) < 5


def test_a_thousand_cancelled_jobs_leave_nothing_behind(studio):
    studio.draw([request()])
    gc.collect()
    tensors_before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for start in range(0, 1000, 50):
        jobs = [
            request(job_id=f"job-{i}", seed=i, partial_images=i % 3, num_inference_steps=50)
            for i in range(start, start + 50)
        ]

        def cancel_some(turn: int, jobs=jobs) -> None:
            for job in jobs[turn % 7 :: 7]:
                studio.worker.cancel(job.job_id)

        studio.draw(jobs, meanwhile=cancel_some)
        assert sum(isinstance(message, Failed) and message.code == "cancelled" for message in studio.messages) == 50
    assert not studio.worker.jobs
    studio.worker.latents.clear()
    studio.messages.clear()
    gc.collect()
    tensors_after = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    assert tensors_after <= tensors_before + 20
    assert studio.draw([request()])["job"].failure is None


def test_arguments_the_pipeline_refuses_are_the_requests_fault(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    drawn = studio.draw([request(extra={"max_sequence_length": 1000})])
    assert drawn["job"].failure.code == "invalid_value"
    assert "max_sequence_length" in drawn["job"].failure.message
    assert studio.draw([request(extra={"max_sequence_length": 16})])["job"].failure is None


def test_a_pipeline_that_fails_in_the_middle_fails_its_job_alone(studio):
    real = studio.served.modules["vae"].real["decode"]

    def broken(*args, **kwargs):
        raise RuntimeError("a bug in the decoder")

    studio.served.modules["vae"].real["decode"] = broken
    try:
        drawn = studio.draw([request()])
    finally:
        studio.served.modules["vae"].real["decode"] = real
    assert drawn["job"].failure.code == "generation_failed"
    assert "a bug in the decoder" in drawn["job"].failure.message
    assert studio.draw([request()])["job"].failure is None


def test_running_out_of_memory_in_a_batch_halves_it_and_alone_fails_the_job(studio):
    transformer = studio.served.modules["transformer"]
    real = transformer.real["forward"]

    def small_device(*args, **kwargs):
        if kwargs["hidden_states"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if kwargs["hidden_states"].shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")
        return real(*args, **kwargs)

    transformer.real["forward"] = small_device
    try:
        together = [request(job_id=f"job-{i}", seed=i) for i in range(4)]
        drawn = studio.draw([*together, request(job_id="large", width=256, height=256)])
    finally:
        transformer.real["forward"] = real
    for job in together:
        assert drawn[job.job_id].failure is None
    assert drawn["large"].failure.code == "out_of_memory"
    assert "40.00 GiB" in drawn["large"].failure.message
    assert studio.draw([request(job_id="large", width=256, height=256)])["large"].failure is None


def test_deterministic_jobs_never_share_a_pass_and_give_the_same_bytes_at_any_load(studio):
    wanted = request(job_id="wanted", deterministic=True)
    alone = studio.draw([wanted])["wanted"].frames
    crowd = [request(job_id=f"other-{i}", seed=i) for i in range(5)]
    drawn = studio.draw([*crowd, wanted])
    assert (drawn["wanted"].frames == alone).all()
    assert all(len(jobs) == 1 for jobs in studio.passes("transformer") if "wanted" in jobs)


def test_a_seen_prompt_does_not_wake_the_encoder(studio):
    studio.draw([request(prompt="a prompt of its own", seed=1)])
    first = studio.passes("text_encoder")
    drawn = studio.draw([request(prompt="a prompt of its own", seed=2)])
    assert len(first) >= 1
    assert studio.passes("text_encoder") == []
    plain = DiffusionPipeline.from_pretrained(studio.served.pipeline.config["_name_or_path"])
    reference = draw_alone(plain, request(prompt="a prompt of its own", seed=2))
    assert (drawn["job"].frames == reference.frames).all()


def test_prompt_cache_keeps_what_was_read_only_and_stays_within_its_bytes(family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path, prompt_cache_mb=1)
    cache = studio.worker.prompt_cache
    studio.draw([request(prompt="a red circle")])
    config = studio.served.pipeline.text_encoder.config
    one_layer = 512 * config.hidden_size * 4
    assert 0 < cache.size_bytes <= 3 * one_layer, "more than the three layers that the pipeline reads is kept"
    for i in range(40):
        studio.draw([request(prompt=f"number {i}", num_inference_steps=1)])
        assert cache.size_bytes <= 1_000_000
    studio.draw([request(prompt="a red circle")])
    assert studio.passes("text_encoder"), "the oldest prompt should have been forgotten"


@pytest.mark.parametrize("name", ["flux-1", "qwen-image", "wan-2.1"])
def test_step_caches_of_two_jobs_stay_apart(name, family_folder, tmp_path):
    """With a step cache on, interleaved jobs give what each gives alone, bit for bit."""
    settings = {"step_cache": "first-block", "step_cache_threshold": 0.5}
    jobs = requests_of(name)
    alone = {}
    for job in jobs:
        alone |= Studio(family_folder(name), tmp_path, **settings).draw([job])
    exact = Studio(family_folder(name), tmp_path).draw(jobs)
    assert any((exact[job.job_id].frames != alone[job.job_id].frames).any() for job in jobs), "nothing was skipped"
    studio = Studio(family_folder(name), tmp_path, **settings)
    together = studio.draw(jobs)
    order = [passed[0] for passed in studio.passes("transformer")]
    assert order != sorted(order), "the jobs ran one after another, not interleaved"
    assert {len(passed) for passed in studio.passes("transformer")} == {1}
    for job in jobs:
        assert together[job.job_id].failure is None
        assert (together[job.job_id].latents == alone[job.job_id].latents).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_vae_in_full_precision_decodes_what_a_denoiser_in_less_hands_it(precision, family_folder, tmp_path):
    studio = Studio(family_folder("stable-diffusion-xl"), tmp_path, precision=precision)
    assert studio.card.precisions["unet"] == precision
    assert studio.card.precisions["vae"] == "fp32"
    drawn = studio.draw(requests_of("stable-diffusion-xl"))
    assert all(result.failure is None for result in drawn.values())
    assert studio.served.modules["vae"].module.dtype == torch.float32


def test_each_job_ends_in_exactly_one_answer(studio):
    jobs = [request(job_id=f"job-{i}", seed=i, num_inference_steps=1 + i % 5) for i in range(30)]
    studio.draw(jobs)
    endings = [message.job_id for message in studio.messages if isinstance(message, Finished | Failed)]
    assert sorted(endings) == sorted(job.job_id for job in jobs)
