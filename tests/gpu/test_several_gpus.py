"""Two GPUs, through NCCL: a model split over them gives what it gives on one, in fp32."""

import pytest
import torch

from worker.in_process import on_ranks
from worker.ranks import denoiser_differences
from worker.test_parallel import DECODED, FAMILIES, TOLERANCE
from worker.vae_ranks import decoder_differences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_denoisers_on_two_gpus_give_what_one_gives(family_folder, tmp_path):
    folders = [family_folder(name) for name in FAMILIES]
    differences = on_ranks(denoiser_differences, 2, "cuda", tmp_path / "meeting", folders)[0]
    assert set(differences) == {f"{name} {layout}" for name in FAMILIES for layout in ("1x2", "2x1")}
    assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}


def test_a_picture_or_clip_decoded_in_bands_by_two_gpus_is_what_one_decodes(family_folder, tmp_path):
    folders = [family_folder(name) for name in DECODED]
    differences = on_ranks(decoder_differences, 2, "cuda", tmp_path / "meeting", folders)[0]
    assert set(differences) == {f"{name} {shape}" for name in DECODED for shape in ("wide", "tall", "small")}
    assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}
