"""Two GPUs, through NCCL: a model split over them gives in fp32 what it gives on one, its blocks plain or tuned."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from worker.in_process import on_ranks
from worker.ranks import compare_denoisers, met
from worker.test_parallel import DECODED, FAMILIES, TOLERANCE
from worker.vae_ranks import compare_decoders

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

FUSED = ("wan-2.1", "flux-1", "qwen-image", "flux-2-klein", "z-image")
COMPILED = ("wan-2.1", "flux-1")
LAYOUTS = ("1x2", "2x1")
PATIENCE_S = 500  # kernels are compiled


def compare(
    rank: int, world: int, meeting_file: Path, folders: dict[str, Path]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return the differences of denoisers, of tuned ones, and of decoders: all on one start of the ranks."""
    began = time.monotonic()

    def say(doing: str) -> None:
        print(f"rank {rank}, {time.monotonic() - began:.0f} s: {doing}", file=sys.stderr, flush=True)

    def of(names: tuple[str, ...]) -> list[Path]:
        return [folders[name] for name in names]

    say("meeting")
    device = met(rank, world, "cuda", meeting_file)
    dist.barrier()
    say("denoisers")
    plain = compare_denoisers(rank, world, device, of(FAMILIES), [""])
    say("decoders")
    decoded = compare_decoders(rank, world, device, of(DECODED))
    say("fused denoisers")
    tuned = compare_denoisers(rank, world, device, of(FUSED), ["fused"])
    say("compiled denoisers")
    tuned |= compare_denoisers(rank, world, device, of(COMPILED), ["fused and compiled"])
    say("done")
    return plain, tuned, decoded


@pytest.fixture(scope="module")
def differences(family_folder, tmp_path_factory):
    folders = {name: family_folder(name) for name in {*FAMILIES, *DECODED, *FUSED}}
    meeting_file = tmp_path_factory.mktemp("ranks") / "meeting"
    return on_ranks(compare, 2, meeting_file, folders, patience_s=PATIENCE_S)[0]


def wrong(found: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error < TOLERANCE}


def test_denoisers_on_two_gpus_give_what_one_gives(differences):
    plain = differences[0]
    assert set(plain) == {f"{name} {layout}" for name in FAMILIES for layout in LAYOUTS}
    assert wrong(plain) == {}


def test_fused_and_compiled_denoisers_on_two_gpus_give_what_plain_ones_give_on_one(differences):
    tuned = differences[1]
    expected = {f"{name} {layout} fused" for name in FUSED for layout in LAYOUTS}
    assert set(tuned) == expected | {f"{name} {layout} fused and compiled" for name in COMPILED for layout in LAYOUTS}
    assert wrong(tuned) == {}


def test_a_picture_or_clip_decoded_in_bands_by_two_gpus_is_what_one_decodes(differences):
    decoded = differences[2]
    assert set(decoded) == {f"{name} {shape}" for name in DECODED for shape in ("wide", "tall", "small")}
    assert wrong(decoded) == {}
