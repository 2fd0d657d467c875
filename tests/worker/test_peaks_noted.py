"""The worker takes down what each phase of a job took, where the device tells."""

from dataclasses import replace

import torch

from photogram.core.config import ServeConfig
from photogram.core.worker_config import Placement
from photogram.models.checkpoint import find_checkpoint
from photogram.models.measured_peaks import MeasuredPeaks, PeakRecord
from photogram.worker.memory import PeakMemory

from .drawing import Studio
from .test_families_served import requests_of

WEIGHTS = {"encode": 1000, "denoise": 2000, "decode": 3000}


class ScriptedPeaks(PeakMemory):
    """A device that tells more with every pass."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_passes = 0

    def begin(self) -> None:
        self.num_passes += 1

    def highest(self) -> int:
        return 10_000 * self.num_passes


def test_the_highest_call_of_each_phase_is_kept_with_the_size_of_its_request(family_folder, tmp_path):
    studio = Studio(family_folder("stable-diffusion-xl"), tmp_path, max_batch_size=1)
    config = ServeConfig(model_path=str(family_folder("stable-diffusion-xl")), data_dir=str(tmp_path)).worker(tmp_path)
    checkpoint = find_checkpoint(config.model_path, revision=None, variant=None)
    placement = Placement().settled()
    record = PeakRecord(MeasuredPeaks(checkpoint, config, "bf16"), placement, WEIGHTS)
    studio.worker.served = replace(studio.served, peaks=record)
    studio.worker._peak = scripted = ScriptedPeaks()
    request = requests_of("stable-diffusion-xl")[0]
    assert studio.draw([request])[request.job_id].failure is None

    kept = MeasuredPeaks(checkpoint, config, "bf16").under(placement)
    assert kept.keys() == {"encode", "denoise", "decode"}
    assert {(peak.width, peak.height, peak.frames) for peak in kept.values()} == {(request.width, request.height, None)}
    assert kept["decode"].num_bytes == 10_000 * scripted.num_passes - 3000, "the last pass is the decoder's"
    assert kept["encode"].num_bytes + 1000 < kept["denoise"].num_bytes + 2000 < kept["decode"].num_bytes + 3000


def test_a_cpu_tells_nothing_and_nothing_is_kept(family_folder, tmp_path):
    studio = Studio(family_folder("stable-diffusion-xl"), tmp_path)
    assert studio.served.peaks is None
    assert not (tmp_path / "memory").exists()
