"""Sound that a pipeline returns beside its frames, on its way to the host."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from photogram.core.errors import GenerationFailed
from photogram.core.messages import Finished, FrameBlock
from photogram.core.wire import HEADER_BYTES, pack, to_host
from photogram.worker.arguments import to_sound
from photogram.worker.frame_store import FrameStore


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
