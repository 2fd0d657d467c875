"""LoRAs of a model that several ranks share: every rank has the same weights at every call."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from photogram.core.messages import LorasReady, LorasRefused, SetLoras
from photogram.core.request import LoraUse

from ..drawing import Drawn, Studio, relative_error
from ..in_process import in_process
from ..test_families_served import requests_of
from .files import diffusers_file, linears

TOLERANCE = 1e-4  # of the latents' range, fp32


def overflowing_file(path: Path, source: Path) -> Path:
    """A LoRA that takes weights out of their range."""
    tensors = {name: tensor.fill_(3e30) for name, tensor in safetensors.torch.load_file(source).items()}
    safetensors.torch.save_file(tensors, path)
    return path


def set_loras(studio: Studio, *uses: LoraUse) -> LorasReady | LorasRefused:
    studio.messages.clear()
    with torch.inference_mode():
        studio.worker.set_loras(SetLoras(request_id="set", uses=uses, merged=True))
        studio.settle()
    return studio.messages[-1]


def draw_with_loras(folder: Path, scratch: Path, num_gpus: int) -> dict[str, np.ndarray]:
    """Latents of one request without LoRAs, with each of two, and without again, a failed set in between."""
    studio = Studio(folder, scratch, num_gpus=num_gpus)
    layers = linears(studio.served.modules["transformer"].module, "blocks")
    files = [diffusers_file(scratch / f"{rank}.safetensors", "transformer", layers, rank=rank) for rank in (2, 4)]
    first, second = (LoraUse(nickname=file.stem, path=str(file), strength=0.2) for file in files)
    plain = msgspec.structs.replace(requests_of("flux-2-klein")[0], num_inference_steps=2)
    with_first = msgspec.structs.replace(plain, job_id="first", loras=(first,))
    with_second = msgspec.structs.replace(plain, job_id="second", loras=(second,))

    def latents_of(drawn: Drawn) -> np.ndarray:
        assert drawn.failure is None, drawn.failure
        assert drawn.latents is not None
        return drawn.latents.numpy()

    def drawn(request) -> np.ndarray:
        return latents_of(studio.draw([request])[request.job_id])

    latents = {"plain": drawn(plain)}
    assert isinstance(set_loras(studio, first), LorasReady)
    latents["set"] = drawn(with_first)
    broken = LoraUse(nickname="broken", path=str(overflowing_file(scratch / "broken.safetensors", files[0])))
    refused = set_loras(studio, broken)
    assert isinstance(refused, LorasRefused)
    assert refused.code == "invalid_lora"
    latents["after a failed set"] = drawn(with_first)
    together = studio.draw([with_first, with_second, plain])
    latents |= {f"{name} of three": latents_of(one) for name, one in together.items()}
    latents["second"] = drawn(with_second)
    assert isinstance(set_loras(studio), LorasReady)
    latents["unmerged"] = drawn(plain)
    return latents


@pytest.mark.long
def test_every_rank_switches_loras_in_step_and_back_to_the_same_bits(family_folder, tmp_path):
    scratch = [tmp_path / name for name in ("one", "two")]
    for folder in scratch:
        folder.mkdir()
    folder = family_folder("flux-2-klein")
    one, two = (in_process(draw_with_loras, folder, place, ranks) for place, ranks in zip(scratch, (1, 2), strict=True))
    assert np.array_equal(two["unmerged"], two["plain"])
    assert np.array_equal(two["after a failed set"], two["set"])
    assert np.array_equal(two["second of three"], two["second"])
    assert np.array_equal(two["first of three"], two["set"])
    assert not np.allclose(two["set"], two["plain"], atol=1e-2)
    assert not np.allclose(two["set"], two["second"], atol=1e-2)
    for name, latents in one.items():
        assert relative_error(*map(torch.from_numpy, (two[name], latents))) < TOLERANCE, name
