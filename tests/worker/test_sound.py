"""Sound that a pipeline returns beside its frames, on its way to the host."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.core.errors import GenerationFailed
from photogram.core.messages import Finished, FrameBlock
from photogram.core.wire import HEADER_BYTES, pack, to_host
from photogram.worker.arguments import to_sound
from photogram.worker.frame_store import FrameStore

from .drawing import Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of


def a_pipeline(**components):
    return SimpleNamespace(components=components)


VOCODER = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=24_000))


def test_sound_reaches_the_host_as_it_was_made(tmp_path):
    waves = torch.linspace(-1, 1, 2000).view(1, 2, 1000)  # (B, channels, samples)
    samples, rate = to_sound(a_pipeline(vocoder=VOCODER), (torch.zeros(1, 1, 3, 8, 8), waves))
    block = FrameStore(str(tmp_path)).put_sound(samples, rate)
    assert (block.shape, block.rate) == ((1000, 2), 24_000)
    kept = np.fromfile(block.path, dtype=np.float32).reshape(block.shape)
    assert np.array_equal(kept.T, waves[0].numpy())
    finished = Finished("job", FrameBlock("frames", (1, 8, 8, 3)), 1, 1, 1.0, sound=block)
    assert [Path(one.path).name for one in finished.blocks] == ["frames", Path(block.path).name]
    assert to_host.decode(pack(finished)[HEADER_BYTES:]) == finished


def test_second_value_of_a_pipeline_without_a_vocoder_is_no_sound():
    assert to_sound(a_pipeline(unet=VOCODER), (torch.zeros(1, 3, 8, 8), [False])) is None


def test_sound_that_is_no_number_fails_the_job():
    with pytest.raises(GenerationFailed, match="sound"):
        to_sound(a_pipeline(vocoder=VOCODER), (None, torch.full((1, 1, 10), float("nan"))))


def sounds_of(studio: Studio) -> dict[str, np.ndarray]:
    """Samples (samples, channels) by job."""
    blocks = {message.job_id: message.sound for message in studio.messages if isinstance(message, Finished)}
    return {name: np.fromfile(block.path, dtype=np.float32).reshape(block.shape) for name, block in blocks.items()}


def test_jobs_side_by_side_have_the_sound_that_each_has_alone(family_folder, tmp_path):
    requests = requests_of("ltx-2")
    plain = DiffusionPipeline.from_pretrained(family_folder("ltx-2"))
    studio = Studio(family_folder("ltx-2"), tmp_path, max_batch_size=1)
    studio.draw(requests)
    heard = sounds_of(studio)
    for request in requests:
        alone = draw_alone(plain, request)
        assert alone.sound.shape == (7920, 2)  # 9 latents of sound are 33 columns of 240 samples
        assert alone.sound.std() > 0.01
        assert np.array_equal(heard[request.job_id], alone.sound)


def test_all_ways_to_guide_picture_and_sound_give_what_the_pipeline_gives(family_folder, tmp_path):
    """Guidance by skipped blocks and by separate halves are denoiser calls of their own."""
    guided = {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1], "modality_scale": 3.0}
    guided |= {"max_sequence_length": 64}
    requests = [msgspec.structs.replace(request, extra=guided) for request in requests_of("ltx-2")]
    plain = DiffusionPipeline.from_pretrained(family_folder("ltx-2"))
    studio = Studio(family_folder("ltx-2"), tmp_path)
    drawn = studio.draw(requests)
    assert max(map(len, studio.passes("transformer"))) == 3
    calls = sum(len(jobs) for jobs in studio.passes("transformer"))
    assert calls == 3 * sum(request.num_inference_steps for request in requests)
    for request in requests:
        alone = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, alone.latents) < STACKED_TOLERANCE


def test_a_prompt_heard_before_gives_the_same_clip_without_its_encoder(family_folder, tmp_path):
    """The pipeline reads all layers of the encoder at once, in code that tells nobody."""
    studio = Studio(family_folder("ltx-2"), tmp_path)
    request = requests_of("ltx-2")[0]
    first = studio.draw([request])[request.job_id]
    again = studio.draw([request])[request.job_id]
    assert studio.passes("text_encoder") == []
    assert np.array_equal(again.frames, first.frames)
